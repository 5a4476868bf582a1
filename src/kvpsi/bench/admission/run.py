"""Plays all of it, one variant after the other, and compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from kvpsi.bench.admission import adaptation, decisions, overload, pace, report
from kvpsi.bench.admission.adaptation import Adaptation
from kvpsi.bench.admission.clients import Asker, arrivals, closed_loop, open_loop
from kvpsi.bench.admission.overload import Overload
from kvpsi.bench.admission.pace import Pace
from kvpsi.bench.admission.plan import COMPARED, RATIO_LEVEL, Loop, Plan, Scenario
from kvpsi.bench.admission.report import Cell
from kvpsi.bench.admission.server import QUEUE, Subject, serving
from kvpsi.bench.prompts import draw_varied
from kvpsi.bench.table import Table

Report = Callable[[str], None]
_ADAPTING = ("limits-adaptive", "limits")
_PACED = ("limits-matched", "kvpsi")


class Bench:
    """What has been played so far."""

    def __init__(self, plan: Plan, out_dir: Path, say: Report) -> None:
        self.plan, self.out_dir, self.say = plan, out_dir, say
        self.rows = Table(out_dir / "admission.csv")
        self.requests = Table(out_dir / "latency_distributions.csv")
        self.gaps = Table(out_dir / "gaps.csv")
        self.tokens = Table(out_dir / "threads.csv")
        self.cells: list[Cell] = []
        self.paces: list[Pace] = []
        self.adapted: list[Adaptation] = []
        self.overloads: dict[Scenario, Overload] = {}
        self.decisions_us: dict[int, float] = {}
        self._seed = plan.seed

    def play(self) -> None:
        """All parts of the plan."""
        parts = self.plan.parts
        if "decisions" in parts:
            self.say("what a decision costs")
            self.decisions_us = decisions.measure(self.plan.seed)
        if "adaptation" in parts:
            self._adaptation()
        for scenario in self.plan.scenarios:
            if "pace" in parts:
                self._pace(scenario)
            loops = tuple(loop for loop in get_args(Loop) if loop in parts)
            for variant in self.plan.variants if loops else ():
                self._levels(scenario, variant, loops)
            for number in range(1, self.plan.rounds):
                self._again(scenario, loops, number)
            if "overload" in parts:
                with serving(self.plan, "kvpsi", scenario, self.say) as subject:
                    self.say(f"{scenario}, overload, kvpsi")
                    self.overloads[scenario] = overload.play(self.plan, subject, self._next_seed())

    def _next_seed(self) -> int:
        """Nobody hears anything twice."""
        self._seed += 1000
        return self._seed

    def _adaptation(self) -> None:
        names = [name for name in _ADAPTING if name in self.plan.variants]
        for number in range(self.plan.rounds):
            seed = self._next_seed()
            for variant in names if number % 2 == 0 else names[::-1]:
                with serving(self.plan, variant, "neighbours", self.say) as subject:
                    self.say(f"round {number + 1} of {self.plan.rounds}: threads, {variant}")
                    played = adaptation.play(subject, number, seed, self.plan.n_predict)
                    self.adapted.append(played)
                    for second, count in enumerate(played.each_second()):
                        self.tokens.add({"variant": variant, "round": number, "second": second, "tokens": count})

    def _pace(self, scenario: Scenario) -> None:
        for variant in _PACED:
            if variant in self.plan.variants:
                with serving(self.plan, variant, scenario, self.say) as subject:
                    self.say(f"{scenario}, pace, {variant}")
                    played = pace.play(self.plan, subject, self._next_seed())
                    self.paces.append(played)
                    for when, gaps in (("alone", played.calm_s), ("beside", played.pressed_s)):
                        for gap_s in gaps:
                            self.gaps.add({"scenario": scenario, "variant": variant, "when": when, "gap_s": gap_s})

    def _levels(self, scenario: Scenario, variant: str, loops: Sequence[Loop]) -> None:
        with serving(self.plan, variant, scenario, self.say) as subject:
            for n_clients in self.plan.levels:
                for loop in loops:
                    self._add(self._play(subject, loop, n_clients, 0))

    def _again(self, scenario: Scenario, loops: Sequence[Loop], number: int) -> None:
        """What is compared once more, the other way round in every other round."""
        if RATIO_LEVEL not in self.plan.levels:
            return
        wanted = {variant: [loop for loop in loops if variant in COMPARED[loop]] for variant in self.plan.variants}
        for variant, again in list(wanted.items())[:: -1 if number % 2 else 1]:
            if again:
                with serving(self.plan, variant, scenario, self.say) as subject:
                    for loop in again:
                        self._add(self._play(subject, loop, RATIO_LEVEL, number))

    def _play(self, subject: Subject, loop: Loop, n_clients: int, number: int) -> Cell:
        plan, asker = self.plan, Asker(subject.url, self.plan.n_predict, self.plan.deadline_s)
        self.say(f"{subject.scenario}, {subject.variant}, {loop} loop, {n_clients} clients")
        seed = plan.seed + 1000 * number + n_clients
        with subject.pressed():
            if loop == "closed":
                limit_s = plan.long_limit_s if n_clients == RATIO_LEVEL else plan.limit_s
                outcomes = closed_loop(asker, draw_varied(n_clients * plan.requests, seed), n_clients, limit_s)
                seconds = max((o.sent_s + o.latency_s for o in outcomes), default=1.0)
            else:
                times = arrivals(n_clients / plan.think_s, plan.open_s, seed)
                prompts = draw_varied(len(times), seed + 100)
                outcomes, seconds = open_loop(asker, prompts, times, 2 * plan.open_s), plan.open_s
        return Cell(subject.scenario, subject.variant, loop, n_clients, number, seconds, tuple(outcomes))

    def _add(self, cell: Cell) -> None:
        self.cells.append(cell)
        self.rows.add(cell.row(self.plan.deadline_s))
        where = {key: getattr(cell, key) for key in ("scenario", "variant", "loop", "clients", "round")}
        for o in cell.outcomes:
            fields = asdict(o)
            gaps = sorted(fields.pop("gaps_s"))
            gap_s = gaps[len(gaps) // 2] if gaps else 0.0
            self.requests.add({**where, **fields, "gap_p50_s": gap_s, "gap_max_s": gaps[-1] if gaps else 0.0})

    def document(self, *, interrupted: bool) -> dict[str, Any]:
        """All of it, JSON-ready."""
        plan = self.plan
        figures = [
            *report.latency_figures(plan, self.cells),
            *report.pace_figures(self.paces),
            *report.adaptation_figures(self.adapted),
            *report.overload_figures(self.overloads, QUEUE),
            *(report.decision_figures(self.decisions_us) if self.decisions_us else ()),
        ]
        tables = (self.rows, self.requests, self.gaps, self.tokens)
        problems = [problem for table in tables for problem in table.problems]
        if RATIO_LEVEL not in plan.levels and {"closed", "open"} & set(plan.parts):
            problems.append(f"Latencies are compared at {RATIO_LEVEL} clients only; add {RATIO_LEVEL} to --levels.")
        if not figures:
            problems.append(f"There is nothing to compare: {' and '.join(plan.variants)} did not play the same part.")
        plots: list[str] = []
        try:
            from kvpsi.bench.admission.plots import plot

            plots = plot(self.out_dir, self.cells, self.adapted, self.paces)
        except ImportError:
            problems.append("There are no plots without matplotlib: `pip install kvpsi[bench]` installs it.")
        except OSError as error:
            problems.append(f"The plots cannot be written ({error.strerror}).")
        return {
            "plan": {**asdict(plan), "model": plan.model.name},
            "interrupted": interrupted,
            "levels": [cell.row(plan.deadline_s) for cell in self.cells],
            "adaptation": [{k: v for k, v in asdict(a).items() if k != "token_s"} for a in self.adapted],
            "pace": [
                {k: v for k, v in asdict(each).items() if k not in ("calm_s", "pressed_s")} for each in self.paces
            ],
            "overload": {scenario: asdict(played) for scenario, played in self.overloads.items()},
            "decisions_us": {str(n): us for n, us in self.decisions_us.items()},
            "figures": [figure.as_json() for figure in figures],
            "problems": problems,
            "raw": [*(path for table in tables for path in table.paths), *plots],
        }


def run(plan: Plan, out_dir: Path, say: Report) -> dict[str, Any]:
    """The whole bench as one JSON-ready document; Ctrl-C ends it with what there is by then."""
    bench = Bench(plan, out_dir, say)
    try:
        bench.play()
    except KeyboardInterrupt:
        return bench.document(interrupted=True)
    return bench.document(interrupted=False)
