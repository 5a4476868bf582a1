"""Settings of the law that cost least on a simulated board: one cost in seconds, and a search that tries them.

What an answer costs others and itself is added up as time, for each minute that is simulated::

    cost = stall of the model + stall of its neighbours, each for itself
         + waiting for room in the cache
         + (tokens that were missing when an answer was begun) x (time to read one of them)
         + (bytes of conversations that were parked) / (speed at which they are loaded)
         + 300 s for each process that was killed

Tokens that are missing count whether they are read again, which takes that time, or not, which costs the answer's
quality: there they are charged with the time that would have mended it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kvpsi.governor.law import LawSettings
from kvpsi.sim.boards import GIB, MIB
from kvpsi.sim.controllers import Law
from kvpsi.sim.engine import LOAD_BYTES_S
from kvpsi.sim.llms import Speed
from kvpsi.sim.play import Lost, Outcome, play
from kvpsi.sim.processes import spread
from kvpsi.sim.situation import Situation

_LAW = LawSettings()
_HIGH_FACTOR = _LAW.high_for(GIB) / _LAW.low_for(GIB)
KILL_S = 300.0
"""Charged for a process that was killed: about what starting a model and reading its conversations again takes."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds lost in each simulated minute: after what is for learning (`Situation.learning_s`), and of the whole."""

    later_s: float
    whole_s: float


def cost_of(situation: Situation, outcome: Outcome) -> Cost:
    """What a run cost."""
    whole_s, first_s = _seconds(situation, outcome.lost), _seconds(situation, outcome.lost_at_first)
    later = situation.seconds - situation.learning_s
    return Cost(60 * (whole_s - first_s) / later, 60 * whole_s / situation.seconds)


def _seconds(situation: Situation, lost: Lost) -> float:
    llm = situation.llm
    read_s = Speed.on(situation.board, llm).chunk_s(1, llm.cache_bytes(situation.n_ctx // 2))
    return (
        lost.stall_s
        + lost.waited_s
        + lost.missing_tokens * read_s
        + llm.cache_bytes(lost.parked_tokens) / LOAD_BYTES_S
        + lost.killed * KILL_S
    )


def mean_cost(costs: Iterable[Cost]) -> Cost:
    """Of several runs."""
    found = list(costs)
    return Cost(statistics.fmean(each.later_s for each in found), statistics.fmean(each.whole_s for each in found))


def cost_with(situation: Situation, controller: Law, seed: int) -> Cost:
    """The same of one seed played with a controller. Only its settings count: ``situation.law`` and ``situation.adapt``
    are ignored."""
    return cost_of(situation, play(situation.setup(seed), controller))


@dataclass(frozen=True, slots=True)
class Choice:
    """Settings that are searched, as `kvpsi.governor.LawSettings` names them; ``high_factor`` is ``high_bytes`` as a
    multiple of ``low_bytes``, and ``step_share`` the largest step, of which the smallest is half."""

    low_bytes: int | None = _LAW.low_bytes
    high_factor: float = _HIGH_FACTOR
    lookahead_s: float = _LAW.lookahead_s
    step_share: float = _LAW.max_step_share
    stall_share: float = _LAW.stall_share
    calm_hold_s: float = _LAW.calm_hold_s
    grow_share: float = _LAW.grow_share

    @property
    def law(self) -> LawSettings:
        """The law with these settings; all others are its defaults."""
        return replace(
            _LAW,
            low_bytes=self.low_bytes,
            high_bytes=None if self.low_bytes is None else int(self.high_factor * self.low_bytes),
            lookahead_s=self.lookahead_s,
            min_step_share=self.step_share / 2,
            max_step_share=self.step_share,
            stall_share=self.stall_share,
            hard_stall_share=max(_LAW.hard_stall_share, self.stall_share),
            calm_hold_s=self.calm_hold_s,
            grow_share=self.grow_share,
        )


SPACE: Mapping[str, tuple[float | int | None, ...]] = {
    "low_bytes": (None, 24 * MIB, 48 * MIB, 96 * MIB, 192 * MIB),
    "lookahead_s": (0.05, 0.1, 0.15),
    "grow_share": (0.05, 0.2, 1.0),
    "calm_hold_s": (0.25, 2.0, 8.0),
    "high_factor": (1.0, 2.0, 3.0),
    "step_share": (0.05, 0.1, 0.2),
    "stall_share": (0.05, 0.15, 0.4),
}
"""What is tried of each setting. Less look-ahead, or a smaller reserve, than real machines need would look good
here only, as most memory is given in no time on a simulated board."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What a choice costs in each of the situations, mean of the seeds."""

    choice: Choice
    costs: tuple[Cost, ...]

    def beside(self, default: Tried) -> float:
        """Mean of the costs as shares of the default's; 1 is as good as it, less is better."""
        pairs = zip(self.costs, default.costs, strict=True)
        return statistics.fmean(ratio(own.later_s, other.later_s) for own, other in pairs)


LEAST_S = 1.0
"""Costs are compared as shares of themselves, or of this if it is more: a tenth of a second a minute is little."""


def ratio(cost: float, other: float) -> float:
    """A cost as a share of another."""
    return 1 + (cost - other) / max(other, LEAST_S)


class Search:
    """Tries one setting after the other, each with all others at the best so far, and begins again at the first until
    a round changes nothing. What it tries follows from what it finds, not from chance.

    Args:
        situations: that all count the same.
        seeds: each situation is played with all of them, every choice with the same ones.
        n_jobs: processes at once, None: one for each processor.
        say: is told how far it is.

    Attributes:
        tried: all choices with what they cost; the default is the first.
    """

    def __init__(
        self,
        situations: Sequence[Situation],
        seeds: Sequence[int],
        n_jobs: int | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.tried: dict[Choice, Tried] = {}
        self._situations, self._seeds, self._n_jobs, self._say = situations, seeds, n_jobs, say

    def run(self, most_rounds: int = 2, start: Choice | None = None) -> Tried:
        """The best; it begins at ``start`` if that is better than the default."""
        default, *others = self._try([Choice(), *([start] if start else [])])
        best = min([default, *others], key=lambda each: each.beside(default))
        for _ in range(most_rounds):
            before = best
            for name, values in SPACE.items():
                found = self._try(list(self._around(best.choice, name, values)))
                best = min([best, *found], key=lambda each: each.beside(default))
            if best is before:
                break
        return best

    def cost_of(self, choice: Choice) -> Cost:
        """What a choice costs, mean of the situations."""
        return mean_cost(self._try([choice])[0].costs)

    def _around(self, choice: Choice, name: str, values: Sequence[float | int | None]) -> Iterator[Choice]:
        """The same choice with other values of one setting, if they make sense."""
        least_bytes = min(each.board.memory_bytes for each in self._situations) // 4
        for value in values:
            changed = replace(choice, **{name: value})  # type: ignore[arg-type]
            if changed.low_bytes is None:
                changed = replace(changed, high_factor=_HIGH_FACTOR)
            elif changed.low_bytes > least_bytes:
                continue
            yield changed

    def _try(self, choices: Sequence[Choice]) -> list[Tried]:
        new = [choice for choice in dict.fromkeys(choices) if choice not in self.tried]
        jobs = [(each, Law(choice.law), seed) for choice in new for each in self._situations for seed in self._seeds]
        costs = spread(cost_with, jobs, self._n_jobs) if jobs else iter(())
        for choice in new:
            means = tuple(mean_cost(next(costs) for _ in self._seeds) for _ in self._situations)
            self.tried[choice] = Tried(choice, means)
            self._say(f"searching, {len(self.tried)} settings were tried")
        return [self.tried[choice] for choice in choices]
