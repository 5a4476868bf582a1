"""Repeats bursts for both reactors, while decoding and while reading, and says how the times are distributed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from kvpsi.bench.conversation import saved
from kvpsi.bench.figures import Figure, quantile
from kvpsi.bench.processes import see_that_boards_can_be_made
from kvpsi.bench.react.play import Burst, Doing, Reactor, play
from kvpsi.bench.react.subject import PROMPT_TOKENS
from kvpsi.bench.table import Table
from kvpsi.board import BoardSettings
from kvpsi.errors import UsageError
from kvpsi.hog import HogSettings

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """How many bursts of each kind, and what they are.

    Attributes:
        model: the GGUF file.
        bursts: for each reactor and each thing that the model does.
        n_ctx, n_tokens: the model's context, and how much of it is full.
        memory_bytes: of the board, which has zram besides.
        hog: the neighbour.
    """

    model: Path
    bursts: int = 10
    n_ctx: int = 16384
    n_tokens: int = 8000
    memory_bytes: int = 600 << 20
    hog: HogSettings = field(
        default_factory=lambda: HogSettings(400 << 20, rate_bytes_s=4 << 30, hold_s=8.0, step_bytes=8 << 20)
    )

    def __post_init__(self) -> None:
        if self.bursts < 1:
            raise UsageError(f"{self.bursts} bursts show nothing; give at least 1 with --bursts.")
        most = self.n_ctx - 2 * PROMPT_TOKENS
        if not 1 <= self.n_tokens <= most:
            raise UsageError(f"The model cannot hold {self.n_tokens} tokens here; give 1 to {most} with --tokens.")


def run(plan: Plan, out_dir: Path, report: Report) -> dict[str, Any]:
    """The whole bench as one JSON-ready document; Ctrl-C ends it with what there is by then.

    Every burst is written down when it is over. A disk that is full does not end the bench: ``problems`` says so.
    """
    table = Table(out_dir / "bursts.csv")
    bursts: list[Burst] = []
    interrupted = False
    try:
        see_that_boards_can_be_made(BoardSettings(plan.memory_bytes, "zram"))
        report(f"reading a conversation of {plan.n_tokens} tokens")
        with saved(plan.model, plan.n_ctx, plan.n_tokens) as talk:
            for number in range(plan.bursts):
                kinds = [(r, d) for r in get_args(Reactor) for d in get_args(Doing)]
                for reactor, doing in kinds[::-1] if number % 2 else kinds:
                    report(f"bursts, {number + 1} of {plan.bursts}: {reactor} while {doing}")
                    bursts.append(play(reactor, doing, plan.model, talk, plan.memory_bytes, plan.hog))
                    table.add({**asdict(bursts[-1]), "reaction_s": bursts[-1].reaction_s})
    except KeyboardInterrupt:
        interrupted = True
    calm = sum(not b.made_pressure for b in bursts)
    idle = [f"{calm} of {len(bursts)} bursts made no pressure and are left out; lower --memory."] if calm else []
    return {
        "plan": {**asdict(plan), "model": plan.model.name},
        "interrupted": interrupted,
        "distributions": _distributions(bursts),
        "figures": [f.as_json() for f in figures_of(bursts)],
        "problems": table.problems + idle,
        "raw": table.paths,
    }


def _distributions(bursts: Sequence[Burst]) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for reactor in get_args(Reactor):
        for doing in get_args(Doing):
            mine = [b for b in bursts if (b.reactor, b.doing) == (reactor, doing)]
            reactions = [b.reaction_s for b in mine if b.reaction_s is not None]
            relieved = [b.relieved_s - b.onset_s for b in mine if b.relieved_s is not None and b.onset_s is not None]
            row: dict[str, object] = {"reactor": reactor, "doing": doing, "bursts": len(mine)}
            row["without_pressure"] = sum(not b.made_pressure for b in mine)
            row["with_kills"] = sum(b.kills > 0 for b in mine)
            row["without_stall"] = sum(b.onset_s is None for b in mine)
            row["without_release"] = sum(b.gave_s is None for b in mine)
            for name, values in (("reaction", reactions), ("relief", relieved)):
                for share in (0.5, 0.9, 0.99):
                    row[f"{name}_p{round(100 * share)}_ms"] = 1000 * quantile(values, share) if values else None
            found.append(row)
    return found


def figures_of(bursts: Sequence[Burst]) -> list[Figure]:
    """The slowest hundredth of kvpsi's reactions, and how many times slower the loop is at the median.

    Bursts in which there was nothing to react to do not count. Where that loop never gave anything back within the
    burst, the whole burst is its time: a lower bound.
    """
    found = []
    if any(b.reactor == "kvpsi" for b in bursts):
        killed = sum(b.kills for b in bursts if b.reactor == "kvpsi")
        found.append(Figure("kvpsi.kills", float(killed), "", 0.0, "=="))
    for doing in get_args(Doing):
        mine = [b for b in bursts if b.doing == doing and b.made_pressure]
        kvpsi = [_bounded_s(b) for b in mine if b.reactor == "kvpsi"]
        avg10 = [_bounded_s(b) for b in mine if b.reactor == "avg10"]
        if kvpsi:
            found.append(Figure(f"{doing}.reaction_p99", 1000 * quantile(kvpsi, 0.99), "ms", 100.0, "<="))
        if kvpsi and avg10:
            times = statistics.median(avg10) / max(1e-3, statistics.median(kvpsi))
            found.append(Figure(f"{doing}.avg10_times_slower", times, "", 10.0, ">="))
    return found


def _bounded_s(burst: Burst) -> float:
    """The reaction; where there was none, the time that was waited for it."""
    return burst.waited_s - (burst.onset_s or 0.0) if burst.reaction_s is None else burst.reaction_s
