"""Options of the simulator that say what is simulated, and what is answered to those that make no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvpsi.cli.main import main

QUICK = ["--seeds", "1", "--seconds", "12", "-j", "1"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["simulate", "--board", "pi5-8gb", "--memory", "8G"], "--board has its memory"),
        (["simulate", "--system", "500M"], "--system is for a board of --memory"),
        (["simulate", "--trace", "/dev/zero"], "no regular file"),
        (["simulate", "-m", ""], "A model has a name"),
        (["simulate", "-m", "70b"], "presets are 1b, 3b"),
        (["plan", "70b"], "presets are 1b, 3b"),
        (["tune", "--compare", "--board", "pi5-8gb", "-m", "1b"], "--board, --model cannot be used with --compare"),
        (["tune", "--memory", "1G"], "does not fit on this board even alone"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err.strip()
    assert complaint in told and "\n" not in told


def test_a_trace_takes_the_place_of_the_usual_neighbours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trace = tmp_path / "camera.csv"
    trace.write_text("0,0\n5,1G\n")
    words = ["--memory", "4G", "--system", "300M", "--swap", "0", "--adapt", "--law", "calm_hold_s=1"]
    assert main(["simulate", *words, "--trace", str(trace), "--controllers", "kvpsi", *QUICK, "--json"]) == 0
    situation = json.loads(capsys.readouterr().out)["situation"]
    assert situation["neighbours"] == [] and situation["trace"]["size_bytes"] == 1 << 30
    assert situation["board"]["system_bytes"] == 300 << 20 and situation["board"]["swap"] is None
    assert situation["adapt"]["fixed"] == ["calm_hold_s"] and situation["law"]["calm_hold_s"] == 1


def test_what_nobody_could_see_is_remarked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", "--memory", "1G", "--controllers", "kvpsi", "--neighbours", "", *QUICK]) == 0
    assert "does not fit on this board even alone" in capsys.readouterr().err
    words = ["--memory", "8G", "--first-tokens", "100000", "-c", "131072"]
    assert main(["simulate", *words, "--controllers", "kvpsi", "--neighbours", "", *QUICK]) == 0
    assert "With kvpsi no answer was begun; give more --seconds." in capsys.readouterr().err
