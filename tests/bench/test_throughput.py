"""The throughput bench: its arithmetic, and a small run against the real server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvpsi.bench.client import Asked, Load, ask, said_by
from kvpsi.bench.prompts import draw
from kvpsi.bench.throughput.run import Plan, Played, figures_of, run
from kvpsi.cli.bench.show import usable_folder
from kvpsi.errors import EnvironmentProblem, UsageError


def played(server: Any, round_number: int, n_clients: int, tok_s: float) -> Played:
    return Played(server, round_number, Load(n_clients, 10.0, (Asked(0.1, 1.0, int(10 * tok_s)),)), 1)


def test_ratios_are_those_of_the_same_round() -> None:
    found = {
        f.name: f
        for f in figures_of(
            [
                *(played("kvpsi", number, 8, speed) for number, speed in ((1, 100.0), (2, 50.0), (3, 90.0))),
                *(played("xllamacpp", number, 8, speed) for number, speed in ((1, 80.0), (2, 40.0), (3, 100.0))),
                played("kvpsi", 1, 1, 90.0),
                played("llama-cpp-python", 1, 1, 100.0),
            ]
        )
    }
    assert found["clients_8.tok_s_to_xllamacpp"].value == pytest.approx(1.25)
    assert found["clients_8.tok_s_to_xllamacpp"].met
    assert found["clients_1.tok_s_to_llama-cpp-python"].value == pytest.approx(0.9)
    assert set(found) == {"clients_8.tok_s_to_xllamacpp", "clients_1.tok_s_to_llama-cpp-python"}


def test_prompts_differ_from_their_first_words_on() -> None:
    prompts = draw(50, 1)
    assert prompts == draw(50, 1) != draw(50, 2) and len({p[:12] for p in prompts}) == 50


@pytest.mark.parametrize("wrong", [{"servers": ()}, {"levels": ()}, {"levels": (0,)}])
def test_plans_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Plan(Path("m.gguf"), **wrong)


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(EnvironmentProblem, match="broke off"):
        ask("http://127.0.0.1:9/v1", [said_by("user", "Hello")], 1)


@pytest.mark.engine
def test_one_small_run(default_model: Path, tmp_path: Path) -> None:
    plan = Plan(default_model, ("kvpsi",), levels=(1, 2), rounds=1, requests=1, n_predict=8, n_ctx=1024, n_threads=1)
    document = run(plan, tmp_path, lambda _: None)
    assert document["problems"] == [] and not document["interrupted"]
    assert [(level["clients"], level["server"]) for level in document["levels"]] == [(1, "kvpsi"), (2, "kvpsi")]
    assert all(
        level["tok_s"] > 0 and level["latency_p50_s"] > level["first_token_p50_s"] for level in document["levels"]
    )
    assert len((tmp_path / "throughput.csv").read_text().splitlines()) == 3


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert usable_folder(tmp_path / "new" / "folder").is_dir()
    for wrong in (tmp_path / "file", tmp_path / "file" / "folder", Path("/proc/nothing")):
        with pytest.raises(UsageError, match="--out-dir"):
            usable_folder(wrong)
