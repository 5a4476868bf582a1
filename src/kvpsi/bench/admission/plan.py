"""Who is compared, and playing what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from kvpsi.board.limited import Limits
from kvpsi.errors import UsageError

Scenario = Literal["quota", "neighbours"]
"""``quota``: the server has half a CPU. ``neighbours``: as many busy processes as there are processors."""
Part = Literal["closed", "open", "pace", "adaptation", "overload", "decisions"]
Loop = Literal["closed", "open"]
RATIO_LEVEL = 8
"""Clients at which variants are compared."""
COMPARED: Mapping[Loop, tuple[str, str]] = {"closed": ("limits", "kvpsi"), "open": ("limits-matched", "kvpsi")}
"""Whose tail latencies are compared, and who is hoped to have the shorter one."""
PARALLEL = 8
"""Answers at once of every server."""
_LONGEST_S = 3600.0
_PLAIN = ("--no-adapt-threads", "--pace", "0")


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to serve.

    Attributes:
        options: of `kvpsi serve`.
        threads: ``stock``: one for each processor; ``matched``: what really can run; ``adaptive``: kvpsi's choice.
        pressed: whether there is a quota, or neighbours; the baseline has neither.
    """

    options: tuple[str, ...]
    threads: Literal["stock", "matched", "adaptive"]
    pressed: bool = True


VARIANTS: Mapping[str, Variant] = {
    "baseline": Variant(("--admission", "static", *_PLAIN), "stock", pressed=False),
    "limits": Variant(("--admission", "static", *_PLAIN), "stock"),
    "limits-matched": Variant(("--admission", "static", *_PLAIN), "matched"),
    "limits-adaptive": Variant(("--admission", "static", "--pace", "0"), "adaptive"),
    "avg10": Variant(("--admission", "avg10", *_PLAIN), "stock"),
    "avg10-matched": Variant(("--admission", "avg10", *_PLAIN), "matched"),
    "static": Variant(("--admission", "static:2", *_PLAIN), "stock"),
    "static-matched": Variant(("--admission", "static:2", *_PLAIN), "matched"),
    "kvpsi-matched": Variant(("--no-adapt-threads",), "matched"),
    "kvpsi": Variant((), "adaptive"),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """One comparison.

    Attributes:
        model: the GGUF file.
        scenarios: what makes CPU pressure.
        variants: whom to compare, of `VARIANTS`.
        parts: what is played.
        rounds: times that what is compared is played, each with servers and neighbours of its own, as it is luck where
            the neighbours leave threads; everything else is played once.
        levels: clients at once, in the closed loop; in the open loop as many as ask every ``think_s`` seconds.
        requests: of each client in the closed loop.
        limit_s: longest time of one level in the closed loop; what is not answered by then counts as taking so long.
        long_limit_s: the same at eight clients, where the ratio is to be told.
        open_s: how long requests arrive in the open loop, and in the overload.
        think_s: mean time between two requests of a client in the open loop.
        deadline_s: within which an answer is worth something; kvpsi is told of it.
        n_predict: tokens of an answer, at most.
        cpus: the quota.
        n_ctx: tokens of context in all.
        streams: answers that are being written when the others arrive (pace).
        seed: of prompts and arrivals.
    """

    model: Path
    scenarios: tuple[Scenario, ...] = ("quota", "neighbours")
    variants: tuple[str, ...] = tuple(VARIANTS)
    parts: tuple[Part, ...] = ("decisions", "pace", "adaptation", "closed", "open", "overload")
    rounds: int = 3
    levels: tuple[int, ...] = (1, 2, 4, 8, 32)
    requests: int = 2
    limit_s: float = 60.0
    long_limit_s: float = 300.0
    open_s: float = 60.0
    think_s: float = 8.0
    deadline_s: float = 30.0
    n_predict: int = 64
    cpus: float = 0.5
    n_ctx: int = 16384
    streams: int = 4
    seed: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown or not self.variants:
            raise UsageError(f"The variants are {', '.join(VARIANTS)}, not {', '.join(unknown) or 'none'}.")
        for name, known, given in (
            ("scenarios", get_args(Scenario), self.scenarios),
            ("parts", get_args(Part), self.parts),
        ):
            if not given or not set(given) <= set(known):
                raise UsageError(f"The {name} are {', '.join(known)}, not {', '.join(given) or 'none'}.")
        if not self.levels:
            raise UsageError("Name one level at least.")
        for option, count in (
            ("rounds", self.rounds),
            ("levels", min(self.levels)),
            ("requests", self.requests),
            ("n-predict", self.n_predict),
            ("streams", self.streams),
        ):
            if count < 1:
                raise UsageError(f"--{option} is at least 1, not {count}.")
        for option, seconds in (
            ("limit-s", self.limit_s),
            ("long-limit-s", self.long_limit_s),
            ("open-s", self.open_s),
            ("think-s", self.think_s),
            ("deadline-s", self.deadline_s),
        ):
            if not 0 < seconds <= _LONGEST_S:
                raise UsageError(f"--{option} is above 0 and at most {_LONGEST_S:.0f} seconds, not {seconds:g}.")
        if self.streams >= PARALLEL:
            raise UsageError(f"The servers answer {PARALLEL} at once, so --streams is at most {PARALLEL - 1}.")
        Limits(self.cpus)  # complains of what makes no sense
        if max(self.levels) > 256:
            raise UsageError("More than 256 clients say more about them than about the server; lower --levels.")
