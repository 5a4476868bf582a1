"""The admission bench: what it makes of what it measured, and the smallest real run."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import pytest

from kvpsi.bench.admission import report
from kvpsi.bench.admission.adaptation import Adaptation
from kvpsi.bench.admission.clients import Outcome, arrivals
from kvpsi.bench.admission.decisions import measure
from kvpsi.bench.admission.overload import Overload
from kvpsi.bench.admission.pace import Pace
from kvpsi.bench.admission.plan import VARIANTS, Loop, Plan
from kvpsi.bench.admission.report import Cell
from kvpsi.bench.admission.run import run
from kvpsi.bench.figures import Figure
from kvpsi.board import BoardPlaces
from kvpsi.errors import UsageError

PLAN = Plan(Path("model.gguf"))


def cell(variant: str, loop: Loop, latencies_s: list[float], *, number: int = 0, cut: int = 0) -> Cell:
    answered = [Outcome(0.0, s, s / 2, (0.1, 0.2), 3, answered=True) for s in latencies_s]
    outcomes = (*answered, *[Outcome(0.0, 240.0, cut=True)] * cut)
    return Cell("quota", variant, loop, 8, number, 10.0, outcomes)


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures}


def test_ratios_of_tail_latencies() -> None:
    found = by_name(
        report.latency_figures(
            PLAN,
            [
                cell("limits", "closed", [100.0], cut=3),
                cell("kvpsi", "closed", [9.0]),
                cell("kvpsi", "closed", [8.0, 10.0], number=1),
                cell("limits-matched", "open", [20.0, 29.0, 50.0, 60.0]),
                cell("kvpsi", "open", [10.0, 15.0, 20.0]),
            ],
        )
    )
    assert found["quota.closed_8.p95_stock_to_kvpsi"].value == 24.0, "what never ended counts as long as it was waited"
    assert found["quota.closed_8.p95_stock_to_kvpsi"].met
    assert found["quota.open_8.p95_matched_to_kvpsi"].value == 3.0
    assert found["quota.open_8.goodput_to_matched"].value == pytest.approx(1.5), "after 30 s an answer is worth nothing"
    assert found["quota.closed_8.answered"].met and found["quota.open_8.answered_to_matched"].value == 1.0
    nothing = by_name(
        report.latency_figures(PLAN, [cell("limits-matched", "open", [40.0]), cell("kvpsi", "open", [9.0])])
    )
    assert nothing["quota.open_8.goodput_to_matched"].value == 1.0, "one answer is no less than none"


def test_a_row_tells_all_of_them() -> None:
    row = cell("limits", "closed", [1.0, 2.0], cut=1).row(30.0)
    assert (row["requests"], row["answered"], row["cut"], row["latency_p95_s"]) == (3, 2, 1, 240.0)
    assert (row["goodput_s"], row["gap_p95_ms"]) == (0.2, 200.0)


def test_pace_threads_overload_and_decisions() -> None:
    pace = Pace("kvpsi", "quota", (0.1,) * 100, (0.1,) * 94 + (0.2,) * 6, 60.0, (5,), (1.0,), ())
    assert by_name(report.pace_figures([pace]))["quota.pace.kvpsi.gap_p95_to_calm"].met is False
    played = [
        Adaptation("limits-adaptive", 0, 100.0, 50.0, 99.0, 10.0, 20.0, 0, (0.5, 1.5, 1.7)),
        Adaptation("limits", 0, 101.0, 8.0, 99.0, 10.0, 20.0, 0, ()),
    ]
    found = by_name(report.adaptation_figures(played))
    assert found["threads.tok_s_beside_neighbours_to_fixed"].met and found["threads.tok_s_afterwards_to_calm"].met
    assert played[0].each_second() == [1, 2] and played[1].each_second() == [0]
    stuck = report.adaptation_figures([played[0], Adaptation("limits", 0, 101.0, 0.0, 99.0, 10.0, 20.0, 0, ())])
    assert by_name(stuck)["threads.tok_s_beside_neighbours_to_fixed"].value == 500.0
    overload = Overload("kvpsi", 1.0, 2.0, 0.95, 120, 60, 0, 0, 60, 50, 64, 70.0)
    figures = by_name(report.overload_figures({"quota": overload}, 64))
    assert all(figure.met for figure in figures.values()) and len(figures) == 4
    for_ever = dataclasses.replace(overload, told_too_long=10)
    assert by_name(report.overload_figures({"quota": for_ever}, 64))["quota.overload.kept_promises"].met is False
    assert [f.met for f in report.decision_figures({1: 10.0, 10_000: 20.0})] == [True, True]


def test_arrivals_come_at_their_rate_and_the_same_for_a_seed() -> None:
    times = arrivals(2.0, 1000.0, 7)
    assert len(times) == pytest.approx(2000, rel=0.1) and times == arrivals(2.0, 1000.0, 7) == sorted(times)
    assert max(times) < 1000


@pytest.mark.parametrize(
    "wrong",
    [
        {"variants": ("fast",)},
        {"scenarios": ("moon",)},
        {"parts": ()},
        {"levels": ()},
        {"levels": (0,)},
        {"rounds": 0},
        {"think_s": 0.0},
        {"deadline_s": math.nan},
        {"open_s": math.inf},
        {"cpus": math.nan},
        {"streams": 8},
        {"open_s": 0.0},
    ],
)
def test_plans_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Plan(Path("model.gguf"), **wrong)  # type: ignore[arg-type]


def test_one_decision_hardly_costs_more_with_many_in_the_queue() -> None:
    cost_us = measure(1, (1, 1000))
    assert set(cost_us) == {1, 1000} and all(us > 0 for us in cost_us.values())


@pytest.mark.engine
@pytest.mark.pressure
def test_the_smallest_run_with_real_servers(board_places: BoardPlaces, default_model: Path, tmp_path: Path) -> None:
    if board_places.cpu is None:
        pytest.skip("NO CPU CONTROLLER HERE: there is no quota to measure.")
    plan = Plan(
        default_model,
        scenarios=("quota",),
        variants=("baseline", "kvpsi"),
        parts=("closed", "open"),
        rounds=1,
        levels=(2,),
        requests=1,
        open_s=8.0,
        think_s=4.0,
        n_predict=4,
        n_ctx=1024,
    )
    document = run(plan, tmp_path, lambda _: None)
    assert {(row["variant"], row["loop"]) for row in document["levels"]} == {
        (variant, loop) for variant in plan.variants for loop in ("closed", "open")
    }
    assert all(row["failed"] == 0 and row["answered"] > 0 for row in document["levels"]), document["levels"]
    rows = list(csv.DictReader((tmp_path / "latency_distributions.csv").read_text().splitlines()))
    assert len(rows) == sum(int(row["requests"]) for row in document["levels"])
    assert set(VARIANTS) >= {row["variant"] for row in rows} and len(document["problems"]) == 2
