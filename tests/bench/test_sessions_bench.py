"""The sessions bench: its arithmetic, and a small run of the real server on a real board."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kvpsi.bench import servers
from kvpsi.bench.servers import names_in
from kvpsi.bench.sessions.play import Plan, Played
from kvpsi.bench.sessions.run import figures_of, run
from kvpsi.board import BoardPlaces
from kvpsi.errors import EnvironmentProblem, UsageError
from kvpsi.hog import HogSettings
from support.boards import left_behind

MIB = 1 << 20


def test_figures_compare_each_conversation_with_itself() -> None:
    mine = Played(
        "kvpsi",
        first_s=[1.0, 4.0, 2.0],
        second_s=[0.05, 0.2, 1.0],
        returned_s=[0.5, 0.4, 0.4],
        first_answers=["a", "b", "c"],
        first_again=["a", "b", "x"],
        answers=["d", "e", "f"],
        answers_again=["d", "e", "f"],
        begun_bytes=100 * MIB,
        full_bytes=300 * MIB,
        beside_bytes=150 * MIB,
        capacity_bytes=200 * MIB,
    )
    killed = Played("xllamacpp", first_s=[1.0], second_s=[0.1], kills=1)
    found = {f.name: f for f in figures_of([mine, killed])}
    assert found["kvpsi.second_turn_to_first"].value == pytest.approx(0.05) and found["kvpsi.second_turn_to_first"].met
    assert found["kvpsi.returned_to_first"].value == pytest.approx(0.2) and not found["kvpsi.returned_to_first"].met
    assert found["kvpsi.growth_to_cache"].value == 1.0 and found["kvpsi.rss_beside_neighbour"].value == 0.5
    assert found["kvpsi.answers_identical"].value == pytest.approx(2 / 3) and not found["kvpsi.answers_identical"].met
    assert found["kvpsi.kills"].met and found["xllamacpp.kills"].value == 1.0
    assert "xllamacpp.growth" not in found, "it did not live to the end of the requests"


@pytest.mark.parametrize(
    "wrong",
    [
        {"servers": ()},
        {"conversations": 0},
        {"requests": 0},
        {"history_tokens": 9000},
        {"request_tokens": 0},
        {"memory_bytes": 1 << 30},
    ],
)
def test_plans_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Plan(Path("m.gguf"), **wrong)


@pytest.mark.pressure
def test_a_board_that_is_too_small_and_servers_that_are_not_there_are_told(
    monkeypatch: pytest.MonkeyPatch, default_model: Path, board_places: BoardPlaces, tmp_path: Path
) -> None:
    plan = Plan(default_model, ("kvpsi",), memory_bytes=60 * MIB, hog=HogSettings(20 * MIB))
    with pytest.raises(EnvironmentProblem, match="--memory"):
        run(plan, tmp_path, lambda _: None)
    assert not left_behind(board_places, os.getpid())
    monkeypatch.setattr(servers, "_MODULES", dict.fromkeys(servers._MODULES, "nothing_of_that_name"))
    with pytest.raises(EnvironmentProblem, match="installed"):
        run(plan, tmp_path, lambda _: None)


@pytest.mark.pressure
def test_what_was_measured_when_it_is_interrupted_is_told(
    monkeypatch: pytest.MonkeyPatch, board_places: BoardPlaces, tmp_path: Path
) -> None:
    def interrupted(_plan: Plan, played: Played, *_: object) -> None:
        played.first_s.append(1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr("kvpsi.bench.sessions.run.play", interrupted)
    document = run(Plan(tmp_path / "no.gguf", ("kvpsi",)), tmp_path, lambda _: None)
    assert document["interrupted"] and document["servers"][0]["first_turn_s"] == 1.0
    assert not left_behind(board_places, os.getpid())


def test_servers_that_nobody_knows_are_refused() -> None:
    assert names_in("kvpsi, xllamacpp") == ("kvpsi", "xllamacpp")
    for wrong in ("", "magic", "kvpsi,"):
        with pytest.raises(UsageError, match="kvpsi-streams"):
            names_in(wrong)


@pytest.mark.engine
@pytest.mark.pressure
def test_one_small_run(board_places: BoardPlaces, default_model: Path, tmp_path: Path) -> None:
    plan = Plan(
        default_model,
        ("kvpsi",),
        conversations=2,
        history_tokens=600,
        requests=3,
        request_tokens=60,
        memory_bytes=700 * MIB,
        hog=HogSettings(430 * MIB, rate_bytes_s=100 * MIB, hold_s=1.0),
        n_ctx=4096,
        n_threads=1,
        spill_max="0",  # so that what was given back is read anew
    )
    document = run(plan, tmp_path, lambda _: None)
    assert document["problems"] == [] and not document["interrupted"]
    (row,) = document["servers"]
    assert row["requests_answered"] == 3 and row["kills"] == 0 and row["neighbour_lived"]
    assert row["second_turn_s"] < row["first_turn_s"] and row["rss_beside_mib"] < row["rss_full_mib"]
    figures = {f["name"]: f["value"] for f in document["figures"]}
    assert figures["kvpsi.answers_identical"] == 1.0 and figures["kvpsi.cached_again"] < 600
    assert len((tmp_path / "resident.csv").read_text().splitlines()) > 6
    assert not left_behind(board_places, os.getpid())
