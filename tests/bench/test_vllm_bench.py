"""The vLLM bench: its arithmetic, and what it refuses; tests_vllm has the real thing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kvpsi.bench.client import Load
from kvpsi.bench.oom.scenarios import draw
from kvpsi.bench.vllm import calm
from kvpsi.bench.vllm.board import Outcome, Room, Variant, patient
from kvpsi.bench.vllm.calm import Played, play_round
from kvpsi.bench.vllm.model import folder_of
from kvpsi.bench.vllm.run import Plan, board_figures, calm_figures, row_of
from kvpsi.bench.vllm.server import Server, Setting
from kvpsi.errors import EnvironmentProblem, UsageError
from kvpsi.hog import HogReport

SETTING = Setting(Path("folder"))
ROOM = Room(memory_bytes=3 << 30, beside_least_bytes=1 << 30, beside_all_bytes=1 << 28)
SCENARIO = draw(1, 1, {1: 1 << 30}, swaps=("none",))[0]


def outcome(
    variant: Variant,
    *,
    kills: int = 0,
    answers: bool = True,
    completed: bool = True,
    failed: int = 0,
    hog_bytes: int = 1 << 29,
) -> Outcome:
    hog = HogReport(completed, None if completed else "SIGKILL", 1.0, hog_bytes, 0.1, 0.0)
    return Outcome(SCENARIO, variant, hog, kills, answers, 9, failed, 1 << 31, 0.0, 0, 0, ROOM)


def values(found: list[Any]) -> dict[str, tuple[float, bool | None]]:
    return {f.name: (f.value, f.met) for f in found}


def parts(number: int, *servers_and_seconds: tuple[str, float]) -> list[Played]:
    return [Played(name, number, part, 100, seconds) for part, (name, seconds) in enumerate(servers_and_seconds)]


def test_a_ratio_is_of_whole_rounds() -> None:
    played = [
        *parts(0, ("kvpsi", 2), ("stock", 1), ("stock", 2), ("kvpsi", 2)),
        *parts(1, ("stock", 1), ("kvpsi", 1), ("kvpsi", 1), ("stock", 1)),
        *parts(2, ("kvpsi", 1), ("stock", 4), ("stock", 4), ("kvpsi", 1)),
        *parts(3, ("stock", 1), ("kvpsi", 100)),
    ]
    assert values(calm_figures(played)) == {"calm.tok_s_to_stock": (1.0, True)}
    assert calm_figures(played[-2:]) == []


def test_both_are_asked_the_same_in_both_orders_and_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    def load(url: str, prompts: list[str], n_clients: int, _: int) -> Load:
        asked.append((url, tuple(prompts)))
        return Load(n_clients, 1.0, ())

    monkeypatch.setattr(calm, "load", load)
    servers = {name: Server(None, name, "") for name in ("stock", "kvpsi")}  # type: ignore[arg-type]
    played = [each for number in (0, 1) for each in play_round(servers, number, 2, 3, 1)]
    assert "".join(p.server[0] for p in played) == "kssk" + "skks"
    for name in servers:
        heard = [prompts for url, prompts in asked if url == name]
        assert len(set(heard)) == 4
    assert asked[0][1] == asked[1][1] != asked[2][1] == asked[3][1]


def test_a_run_counts_as_survived_if_both_lived() -> None:
    good = values(board_figures([outcome("kvpsi"), outcome("stock", kills=1, answers=False)]))
    assert good["kvpsi.runs_with_kills"] == (0, True) and good["kvpsi.runs_not_survived"] == (0, True)
    assert good["stock.share_of_runs_with_kills"] == (1, True) and good["stock.share_of_runs_with_vllm_killed"][0] == 1
    bad = [outcome("kvpsi", answers=False), outcome("kvpsi", completed=False), outcome("kvpsi", kills=1, failed=2)]
    found = values(board_figures([*bad, outcome("stock"), outcome("stock", kills=1)]))
    assert found["kvpsi.runs_not_survived"] == (2, False) and found["kvpsi.runs_with_kills"] == (1, False)
    assert found["kvpsi.failed_requests"] == (2, False) and found["stock.share_of_runs_with_kills"] == (0.5, False)
    assert row_of(bad[1])["hog_killed_by"] == "SIGKILL"


def test_a_neighbour_that_took_no_more_than_stock_has_room_for_shows_nothing() -> None:
    found = values(board_figures([outcome("kvpsi", hog_bytes=(1 << 28) + 1), outcome("kvpsi", hog_bytes=1 << 28)]))
    assert found["kvpsi.runs_not_survived"] == (1, False) and found["kvpsi.runs_with_kills"] == (0, True)


def test_a_neighbour_comes_back_and_stays() -> None:
    for scenario in draw(12, 1, {1: 1 << 30}, swaps=("none",)):
        hog = patient(scenario.hog)
        assert hog.duration_s > 2 * hog.period_s - 0.001 and hog.hold_s >= 10
        for n in (0, 1):
            most_bytes = max(hog.target_bytes((n + i / 100) * hog.period_s) for i in range(100))
            assert most_bytes > 0.9 * hog.size_bytes
        assert hog.period_s * (0.5 if hog.shape == "pulse" else 1) > hog.grown_s + 4, "time for a slow one"


def test_neighbours_fit_beside_the_governed_one_only() -> None:
    room = Room(memory_bytes=700 << 20, beside_least_bytes=1000 << 20, beside_all_bytes=700 << 20)
    assert room.shares == pytest.approx((0.77, 0.95))
    sizes = [s.hog.size_bytes >> 20 for s in draw(50, 1, {1: 1000 << 20}, swaps=("none",), shares=room.shares)]
    assert 768 <= min(sizes) < 800 and 900 < max(sizes) <= 950
    assert Room(2000, 1000, 900).shares[0] > 0.95 and Room(2000, 1000, -5).shares[0] == 0.2


@pytest.mark.parametrize("wrong", [{"rounds": 0, "runs": 0}, {"rounds": -1}, {"runs": -1}, {"n_clients": 0}])
def test_plans_that_measure_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"[Gg]ive --rounds"):
        dataclasses.replace(Plan(SETTING), **wrong)


def test_without_vllm_a_sentence_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="make bench-vllm"):
        folder_of(tmp_path / "model.gguf")
