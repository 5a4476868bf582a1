"""Draws the scenarios, plays each for both variants, and counts."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from kvpsi.bench.conversation import Conversation, saved
from kvpsi.bench.figures import Figure, quantile
from kvpsi.bench.oom.play import Outcome, Variant, floor_bytes, play
from kvpsi.bench.oom.scenarios import draw
from kvpsi.bench.processes import see_that_boards_can_be_made
from kvpsi.bench.table import Table
from kvpsi.board import BoardSettings
from kvpsi.errors import UsageError

Report = Callable[[str], None]
_FULL_SHARE = 0.85
_EMPTY_TOKENS = 300


@dataclass(frozen=True, slots=True)
class Plan:
    """How many scenarios, from which seed, on how large a board.

    ``n_ctx`` is the context in tokens of a model that is alone, and of each of two: a board has room for two that start
    one after the other, each of which takes its whole cache at first.
    """

    model: Path
    runs: int = 50
    seed: int = 1
    memory_bytes: int = 600 << 20
    n_ctx: tuple[int, int] = (16384, 6144)
    variants: tuple[Variant, ...] = ("kvpsi", "fixed")

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise UsageError(f"{self.runs} runs show nothing; give at least 1 with --runs.")
        if not self.variants or not set(self.variants) <= set(get_args(Variant)):
            raise UsageError(f"The variants are {', '.join(get_args(Variant))}, not {','.join(self.variants)}.")
        if len(set(self.variants)) < len(self.variants):
            raise UsageError("Name each variant once.")


def run(plan: Plan, out_dir: Path, report: Report) -> dict[str, Any]:
    """The whole bench as one JSON-ready document; Ctrl-C ends it with what there is by then.

    Every run is written down when it is over. A disk that is full does not end the bench: ``problems`` says so.
    """
    table = Table(out_dir / "oom.csv")
    outcomes: list[Outcome] = []
    interrupted = False
    room: dict[int, int] = {}
    with contextlib.ExitStack() as files:
        try:
            see_that_boards_can_be_made(BoardSettings(plan.memory_bytes, "zram"))
            talks = _conversations(plan, files, report)
            report("measuring what models take at their floor")
            for n_models in (1, 2):
                used = floor_bytes(plan.model, talks[n_models, False], plan.memory_bytes, n_models)
                room[n_models] = max(2 << 20, plan.memory_bytes - used)
            for scenario in draw(plan.runs, plan.seed, room):
                turn = scenario.number % 2
                for variant in plan.variants[::-1] if turn else plan.variants:
                    report(f"playing, {scenario.number + 1} of {plan.runs}: {variant}, {_told(outcomes)}")
                    talk = talks[scenario.n_models, scenario.full]
                    outcomes.append(play(scenario, variant, plan.model, talk, plan.memory_bytes))
                    table.add(row_of(outcomes[-1]))
        except KeyboardInterrupt:
            interrupted = True
    return {
        "plan": {**asdict(plan), "model": plan.model.name},
        "interrupted": interrupted,
        "room_bytes": room,
        "variants": {v: _summary([o for o in outcomes if o.variant == v]) for v in plan.variants},
        "figures": [f.as_json() for f in figures_of(outcomes)],
        "problems": table.problems,
        "raw": table.paths,
    }


def _conversations(plan: Plan, files: contextlib.ExitStack, report: Report) -> dict[tuple[int, bool], Conversation]:
    """What each of so many models holds at first, nearly full or nearly empty."""
    found = {}
    for n_models, n_ctx in enumerate(plan.n_ctx, start=1):
        for full, n_tokens in ((True, int(_FULL_SHARE * n_ctx)), (False, _EMPTY_TOKENS)):
            report(f"reading conversations, {n_tokens} tokens")
            found[n_models, full] = files.enter_context(saved(plan.model, n_ctx, n_tokens))
    return found


def _told(outcomes: Sequence[Outcome]) -> str:
    with_kills = [o.variant for o in outcomes if o.kills]
    return ", ".join(f"{variant} killed {with_kills.count(variant)}" for variant in get_args(Variant))


def _summary(outcomes: Sequence[Outcome]) -> dict[str, object]:
    done = [each for o in outcomes for each in o.done if each]
    seconds = [s for each in done for s in each["seconds"]]
    return {
        "runs": len(outcomes),
        "runs_with_kills": sum(bool(o.kills) for o in outcomes),
        "models_killed": sum(o.models_killed for o in outcomes),
        "hogs_killed": sum(o.hog.killed_by is not None for o in outcomes),
        "refused_tokens": sum(each["refused"] for each in done),
        "not_trusted": sum(not each["trusted"] for each in done),
        "median_peak_bytes": statistics.median([o.peak_bytes for o in outcomes]) if outcomes else 0,
        "median_stall_s": statistics.median([o.stall_s for o in outcomes]) if outcomes else 0.0,
        "p50_ms": 1000 * quantile(seconds, 0.5),
        "p99_ms": 1000 * quantile(seconds, 0.99),
        "max_ms": 1000 * max(seconds, default=0.0),
    }


def figures_of(outcomes: Sequence[Outcome]) -> list[Figure]:
    """Who was killed."""
    governed = [o for o in outcomes if o.variant == "kvpsi"]
    fixed = [o for o in outcomes if o.variant == "fixed"]
    found = []
    if governed:
        found.append(Figure("kvpsi.runs_with_kills", float(sum(bool(o.kills) for o in governed)), "", 0.0, "=="))
        unfinished = sum(o.models_killed for o in governed)
        found.append(Figure("kvpsi.models_without_an_end", float(unfinished), "", 0.0, "=="))
        refused = sum(each["refused"] for o in governed for each in o.done if each)
        found.append(Figure("kvpsi.refused_tokens", float(refused), ""))
    if fixed:
        share = sum(bool(o.kills) for o in fixed) / len(fixed)
        found.append(Figure("fixed.share_of_runs_with_kills", share, "", 0.5, ">="))
    return found


def row_of(outcome: Outcome) -> dict[str, object]:
    """One scenario and variant in a line."""
    scenario, done = outcome.scenario, [each for each in outcome.done if each]
    seconds = [t for each in done for t in each["seconds"]]
    return {
        "number": scenario.number,
        "variant": outcome.variant,
        "swap": scenario.swap,
        "n_models": scenario.n_models,
        "full": scenario.full,
        "shape": scenario.hog.shape,
        "size_mib": scenario.hog.size_bytes >> 20,
        "rate_mib_s": round(scenario.hog.rate_bytes_s / (1 << 20), 1),
        "models_killed": outcome.models_killed,
        "hog_killed_by": outcome.hog.killed_by,
        "kills": outcome.kills,
        "peak_mib": outcome.peak_bytes >> 20,
        "stall_s": round(outcome.stall_s, 3),
        "hog_stall_s": outcome.hog.stall_s,
        "trims": sum(each["trims"] for each in done),
        "refused": sum(each["refused"] for each in done),
        "tokens": len(seconds),
        "p50_ms": round(1000 * quantile(seconds, 0.5), 1),
        "p99_ms": round(1000 * quantile(seconds, 0.99), 1),
        "max_ms": round(1000 * max(seconds, default=0.0), 1),
    }
