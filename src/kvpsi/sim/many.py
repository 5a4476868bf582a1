"""The same situations for several controllers, many times over, on all processors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvpsi.bench.figures import Figure, quantile
from kvpsi.errors import UsageError
from kvpsi.governor.law import LawSettings
from kvpsi.hog import HogSettings
from kvpsi.sim import conversation, neighbours
from kvpsi.sim.attackers import most_beyond, most_within
from kvpsi.sim.boards import MIB, Board
from kvpsi.sim.controllers import CONTROLLERS, Law, controller_named
from kvpsi.sim.conversation import Talk
from kvpsi.sim.llms import Llm
from kvpsi.sim.planning import safe_tokens
from kvpsi.sim.play import LONGEST_S, Outcome, Setup, play
from kvpsi.sim.processes import spread

SAFE = "safe"
"""A static cache of the size that fits even when all neighbours have most, which is what careful people choose."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What is the same for all controllers; each seed draws its own neighbours and conversations of it.

    Attributes:
        board, llm, n_ctx: as for `kvpsi.sim.play.Setup`.
        neighbours: kinds and the most that each takes, in bytes.
        trace: a recorded neighbour instead of or beside these.
        talk: how conversations are drawn.
        seconds: that are simulated.
        law: settings of kvpsi's own.
        elsewhere_share: of the time in which somebody stalls who has a limit of their own.
        learning_s: at the beginning, which is told apart.
    """

    board: Board
    llm: Llm
    n_ctx: int
    neighbours: tuple[tuple[str, int], ...] = ()
    trace: HogSettings | None = None
    talk: Talk = field(default_factory=Talk)
    seconds: float = 120.0
    law: LawSettings = field(default_factory=LawSettings)
    elsewhere_share: float = 0.0
    learning_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= LONGEST_S:
            raise UsageError(f"{self.seconds:g} s cannot be simulated; give more than 0 and at most {LONGEST_S:.0f}.")

    def setup(self, seed: int) -> Setup:
        """The situation of a seed."""
        drawn = [
            (f"{kind} {number}", process)
            for number, (kind, size) in enumerate(self.neighbours, start=1)
            for process in neighbours.processes(kind, size, self.seconds, 1000 * seed + number)
        ]
        if self.trace is not None:
            drawn.append(("trace", self.trace))
        turns = conversation.draw(self.talk, self.seconds, seed)
        elsewhere = neighbours.draw_stall(self.elsewhere_share, self.seconds, seed)
        return Setup(
            self.board,
            self.llm,
            self.n_ctx,
            turns,
            drawn,
            self.seconds,
            learning_s=self.learning_s,
            elsewhere=elsewhere,
        )

    @property
    def forget_tokens_s(self) -> float:
        """Tokens a second that kvpsi's guards allow a cache that shrinks to forget."""
        capacity_bytes = self.llm.cache_bytes(self.n_ctx)
        return self.law.guards.rate_bytes_s(capacity_bytes) / self.llm.bytes_per_token

    @property
    def most_beside_bytes(self) -> int:
        """What all neighbours take at most, at the same time."""
        most = sum(size for _, size in self.neighbours)
        if self.trace is not None:
            most += max((size for _, size in self.trace.trace), default=self.trace.size_bytes)
        return most

    def safe_ctx(self) -> int:
        """Tokens of a static cache for which there is always room; 0 if there is none."""
        return safe_tokens(self.board, self.llm, self.n_ctx, self.most_beside_bytes)


def play_one(situation: Situation, name: str, seed: int) -> Outcome:
    """One seed with one controller.

    Raises:
        UsageError: there is no such controller.
    """
    setup = situation.setup(seed)
    if name == SAFE:
        n_ctx = situation.safe_ctx()
        if n_ctx < 1:
            raise UsageError("Even without a cache this model does not fit beside the neighbours at their most.")
        return replace(play(replace(setup, n_ctx=n_ctx), controller_named("static")), controller=SAFE)
    return play(setup, Law(situation.law) if name == Law.name else controller_named(name))


def controllers_in(names: Sequence[str]) -> tuple[str, ...]:
    """The names, if all are known.

    Raises:
        UsageError: one is not.
    """
    return names_in(names, (SAFE, *CONTROLLERS), "Controllers")


def names_in(names: Sequence[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    """The names, each once, if all are known.

    Raises:
        UsageError: one is not, or there are none; ``what`` says what they are names of.
    """
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(f"{what} are {', '.join(known)}, not {', '.join(unknown) or 'none'}.")
    return tuple(dict.fromkeys(names))


def play_all(
    situation: Situation,
    names: Sequence[str],
    seeds: Sequence[int],
    n_jobs: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, list[Outcome]]:
    """All seeds with all controllers, on so many processors at once (None: all)."""
    found: dict[str, list[Outcome]] = {name: [] for name in names}
    jobs = [(name, seed) for seed in seeds for name in names]
    outcomes = spread(play_one, [(situation, *job) for job in jobs], n_jobs)
    for number, ((name, _), outcome) in enumerate(zip(jobs, outcomes, strict=True), start=1):
        found[name].append(outcome)
        say(f"simulating, {number} of {len(jobs)}")
    return found


def row(name: str, outcomes: Sequence[Outcome], forget_tokens_s: float = 0.0) -> dict[str, object]:
    """One controller in a table: sums of who was killed, the most that was shed in any minute, and in any time beyond
    this rate, else means."""

    def mean(value: Callable[[Outcome], float]) -> float:
        return statistics.fmean(value(each) for each in outcomes)

    return {
        "controller": name,
        "runs": len(outcomes),
        "runs_with_a_kill": sum(bool(each.killed) for each in outcomes),
        "models_killed": sum("model" in each.killed for each in outcomes),
        "neighbours_killed": sum(len([n for n in each.killed if n != "model"]) for each in outcomes),
        "peak_mib": round(max(each.peak_bytes for each in outcomes) / MIB),
        "stall_s": round(mean(lambda each: each.stall_s), 3),
        "stall_p95_s": round(quantile([each.stall_s for each in outcomes], 0.95), 3),
        "tokens_lost": round(mean(lambda each: each.forgotten_tokens), 1),
        "tokens_shed": round(mean(lambda each: sum(amount for _, amount in each.shed)), 1),
        "shed_in_a_minute": max(most_within(each.shed, 60.0) for each in outcomes),
        "shed_beyond_rate": round(max(most_beyond(each.shed, forget_tokens_s) for each in outcomes)),
        "tokens_reread": round(mean(lambda each: each.reread_tokens), 1),
        "tokens_parked": round(mean(lambda each: each.parked_tokens), 1),
        "tokens_refused": round(mean(lambda each: each.refused_tokens), 1),
        "restarts": round(mean(lambda each: each.restarts), 1),
        "tok_s": round(mean(lambda each: each.tok_s), 2),
        "context_reached": round(mean(lambda each: each.longest_context)),
    }


def figures(found: Mapping[str, Sequence[Outcome]], forget_tokens_s: float = 0.0) -> list[Figure]:
    """The same as figures, for the programs that read those of the benches."""
    units = {"peak_mib": "MiB", "stall_s": "s", "stall_p95_s": "s", "tok_s": "tok/s", "context_reached": "tokens"}
    return [
        Figure(f"{name}.{key}", float(value), units.get(key, ""))
        for name, outcomes in found.items()
        for key, value in row(name, outcomes, forget_tokens_s).items()
        if isinstance(value, (int, float))
    ]
