"""What is simulated of one board: all that is the same for whoever sizes the cache, and for all seeds."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvpsi.errors import UsageError
from kvpsi.governor.adapt import AdaptSettings
from kvpsi.governor.law import LawSettings
from kvpsi.hog import HogSettings
from kvpsi.sim import conversation, neighbours
from kvpsi.sim.boards import Board
from kvpsi.sim.conversation import Talk
from kvpsi.sim.llms import Llm
from kvpsi.sim.planning import safe_tokens
from kvpsi.sim.play import LONGEST_S, Setup


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
        adapt: bounds within which they follow what the board shows; None: they stay as they are.
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
    adapt: AdaptSettings | None = None
    elsewhere_share: float = 0.0
    learning_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= LONGEST_S:
            raise UsageError(f"{self.seconds:g} s cannot be simulated; give more than 0 and at most {LONGEST_S:.0f}.")

    def neighbours_of(self, seed: int) -> list[tuple[str, HogSettings]]:
        """By name, the processes that take memory, too."""
        drawn = neighbours.all_of(self.neighbours, self.seconds, seed)
        return drawn if self.trace is None else [*drawn, ("trace", self.trace)]

    def setup(self, seed: int) -> Setup:
        """The situation of a seed."""
        turns = conversation.draw(self.talk, self.seconds, seed)
        elsewhere = neighbours.draw_stall(self.elsewhere_share, self.seconds, seed)
        return Setup(
            self.board,
            self.llm,
            self.n_ctx,
            turns,
            self.neighbours_of(seed),
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
