"""Real runs of `kvpsi bench pressure`, simulated again: what was predicted beside what was measured.

What the simulation is told of a run is how it was set up (the plan), the header of its model, and how long a token took
while it was calm. Everything else is the simulator's own: the constants of the machine were fitted to other runs.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvpsi.bench.figures import Figure
from kvpsi.errors import UsageError
from kvpsi.hog import HogSettings
from kvpsi.kv import CacheSettings
from kvpsi.sim.boards import MIB, Board, Swap
from kvpsi.sim.controllers import Controller, Prune, controller_named
from kvpsi.sim.conversation import Turn
from kvpsi.sim.llms import Llm, Speed
from kvpsi.sim.play import Outcome, Setup, play

VARIANTS: Mapping[str, str] = {"calm": "kvpsi", "fixed": "static", "kvpsi": "kvpsi"}
"""Variants of the bench, and who decides there; ``prune`` has a threshold of its own."""
TOLERANCE = 0.20
LEAST_STALL_S = 0.25
"""Stall is compared in shares of itself, or of this if it is less: a twentieth of a second more or less is chance."""
_LONGEST_S = 3600.0
_READ_SHARE = 0.5  # of a token's time, to read one of a prompt on one thread


@dataclass(frozen=True, slots=True)
class Calibration:
    """Constants of the machine that real runs were made on.

    Attributes:
        runtime_bytes: of the model's process, besides weights and cache.
        zram_write_bytes_s, zram_read_bytes_s, zram_share: of its compressed swap.
        read_bytes_s: of its disk.
        step_tokens: what every token takes is as much as attending to so many tokens takes.
    """

    runtime_bytes: int = 93 * MIB
    zram_write_bytes_s: float = 300 * MIB
    zram_read_bytes_s: float = 600 * MIB
    zram_zero_bytes_s: float = 520 * MIB
    zram_share: float = 0.0
    read_bytes_s: float = 4000 * MIB
    step_tokens: int = 820


@dataclass(frozen=True, slots=True)
class Compared:
    """One variant: what was measured, as the median of its rounds, and what was predicted. Stall is of the board, in
    seconds while tokens were generated beside the neighbour; tokens are those whose memory is committed; ``killed`` is
    what happened in most rounds."""

    file: str
    variant: str
    rounds: int
    killed: bool
    predicted_killed: bool
    final_tokens: int
    predicted_final_tokens: int
    peak_tokens: int
    predicted_peak_tokens: int
    stall_s: float
    predicted_stall_s: float

    @property
    def errors(self) -> dict[str, float]:
        """As shares; resident tokens only where nobody was killed, as such a run ends early."""
        found = {"stall": abs(self.predicted_stall_s - self.stall_s) / max(self.stall_s, LEAST_STALL_S)}
        if not self.killed:
            found["final"] = abs(self.predicted_final_tokens / max(1, self.final_tokens) - 1)
            found["peak"] = abs(self.predicted_peak_tokens / max(1, self.peak_tokens) - 1)
        return found

    @property
    def is_right(self) -> bool:
        """Kills exactly, the rest within `TOLERANCE`."""
        return self.killed == self.predicted_killed and max(self.errors.values()) <= TOLERANCE


def read_results(path: Path) -> dict[str, Any]:
    """A ``result.json`` of the bench.

    Raises:
        UsageError: it is none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["plan"]["hog"] and document["runs"][0]["calm_step_ms"]:
            return dict(document)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{path} is no result.json of `kvpsi bench pressure` ({error!r}).") from error
    raise UsageError(f"{path} holds no run of `kvpsi bench pressure`.")


def compare(path: Path, llm: Llm, calibration: Calibration | None = None) -> list[Compared]:
    """All variants of a result that can be simulated.

    Raises:
        UsageError: the file is no result.
    """
    document, calibration = read_results(path), calibration or Calibration()
    llm = replace(llm, runtime_bytes=calibration.runtime_bytes)
    rounds: dict[str, list[Mapping[str, Any]]] = {}
    for run in document["runs"]:
        if run["variant"] in (*VARIANTS, "prune") and run["tokens"]:
            rounds.setdefault(run["variant"], []).append(run)
    return [_compare(path.name, document["plan"], runs, llm, calibration) for runs in rounds.values()]


def _compare(
    name: str, plan: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], llm: Llm, calibration: Calibration
) -> Compared:
    def median(value: Callable[[Mapping[str, Any]], float]) -> float:
        return statistics.median(value(run) for run in runs)

    variant = runs[0]["variant"]
    calm, outcome = predict(plan, variant, median(lambda run: run["calm_step_ms"]) / 1000, llm, calibration)
    samples = [sample for sample in outcome.samples if sample.time_s >= calm.busy_s]
    tokens = [sample.cache_bytes // llm.bytes_per_token for sample in samples] or [0]
    return Compared(
        file=name,
        variant=variant,
        rounds=len(runs),
        killed=median(lambda run: bool(run["kills"])) > 0.5,
        predicted_killed=bool(outcome.killed),
        final_tokens=int(median(lambda run: run["final_kv_cells"])),
        predicted_final_tokens=tokens[-1],
        peak_tokens=int(median(lambda run: run["peak_kv_cells"])),
        predicted_peak_tokens=max(tokens),
        stall_s=median(lambda run: run["board_stall"] * run["tokens"] / run["tok_s"]),
        predicted_stall_s=outcome.stall_s - calm.stall_s,
    )


def predict(
    plan: Mapping[str, Any], variant: str, calm_token_s: float, llm: Llm, calibration: Calibration
) -> tuple[Outcome, Outcome]:
    """Simulate a run of a plan: until the neighbour begins, and again until all tokens beside it are there."""
    n_calm = plan["prompt_tokens"] + plan["calm_tokens"] // 2
    step_s = calm_token_s / (1 + n_calm / calibration.step_tokens)
    byte_s = step_s / calibration.step_tokens / llm.bytes_per_token
    loaded = Turn(0.0, "one", plan["prompt_tokens"], plan["calm_tokens"], at_once=True)
    setup = Setup(
        board=_board(plan["board"], calibration),
        llm=llm,
        n_ctx=plan["n_ctx"],
        turns=[loaded],
        seconds=_LONGEST_S,
        speed=Speed(step_s, byte_s, _READ_SHARE * step_s, _READ_SHARE * byte_s),
        settings=CacheSettings(plan["keep"], plan["tail"], plan["min_prune"], turn=0),
        ends_with_turns=True,
    )
    calm = play(setup, _controller(variant, plan))
    neighbours = []
    if variant != "calm":
        fields = {**plan["hog"], "trace": tuple(map(tuple, plan["hog"]["trace"])), "hold_s": _LONGEST_S}
        hog = HogSettings(**fields)
        neighbours = [("neighbour", replace(hog, warmup_s=hog.warmup_s + calm.busy_s))]
    turns = [loaded, Turn(0.0, "one", 0, plan["n_predict"])]
    return calm, play(replace(setup, turns=turns, neighbours=neighbours), _controller(variant, plan))


def _controller(variant: str, plan: Mapping[str, Any]) -> Controller:
    return Prune(plan["prune_threshold"]) if variant == "prune" else controller_named(VARIANTS[variant])


def _board(board: Mapping[str, Any], calibration: Calibration) -> Board:
    swap = None
    if board["swap"] == "zram":
        speeds = calibration.zram_write_bytes_s, calibration.zram_read_bytes_s
        swap = Swap(board["memory_bytes"] // 2, *speeds, calibration.zram_share, calibration.zram_zero_bytes_s)
    return Board(
        "cgroup", board["memory_bytes"], swap=swap, read_bytes_s=calibration.read_bytes_s, scope="cgroup:board"
    )


def figures(compared: Sequence[Compared]) -> list[Figure]:
    """How many runs there were, how many were predicted, and the largest errors."""
    found = [
        Figure("runs", float(len(compared)), "", 8.0, ">="),
        Figure("predicted", float(sum(c.is_right for c in compared)), "", 8.0, ">="),
        Figure("kills_wrong", float(sum(c.killed != c.predicted_killed for c in compared)), "", 0.0, "=="),
    ]
    for name in ("final", "peak", "stall"):
        worst = max((c.errors[name] for c in compared if name in c.errors), default=0.0)
        found.append(Figure(f"worst_{name}_error", worst, "", TOLERANCE))
    return found
