"""Who is on a board with several governed models, and what is asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvpsi.errors import UsageError
from kvpsi.governor.adapt import AdaptSettings
from kvpsi.governor.law import LawSettings
from kvpsi.governor.shares import ShareSettings
from kvpsi.hog import HogSettings
from kvpsi.kv import CacheSettings
from kvpsi.sim import conversation
from kvpsi.sim.boards import Board
from kvpsi.sim.conversation import Turn
from kvpsi.sim.llms import Llm, Speed
from kvpsi.sim.play import LONGEST_S
from kvpsi.sim.situation import Situation

SETTLING_S = 10.0
"""Time in which models should have come to their shares."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """One governed model of several.

    Attributes:
        name: whose figures are told.
        llm: the model; those of the same name map the same weights.
        n_ctx: tokens of its cache.
        turns: what is asked of it.
        share: its weight and priority.
        speed: None: what follows from the board, as if it computed alone.
        settings: what eviction leaves alone.
        law: constants of the control law.
        adapt: bounds within which they follow what the board shows; None: they stay as they are.
    """

    name: str
    llm: Llm
    n_ctx: int
    turns: Sequence[Turn]
    share: ShareSettings = field(default_factory=ShareSettings)
    speed: Speed | None = None
    settings: CacheSettings = field(default_factory=CacheSettings)
    law: LawSettings = field(default_factory=LawSettings)
    adapt: AdaptSettings | None = None


@dataclass(frozen=True, slots=True)
class Together:
    """Who is on the board.

    Attributes:
        board: the machine.
        tenants: the models.
        neighbours: by name, what else takes memory.
        seconds: that are simulated.
        settling_s: time that the models have to come to their shares, before these are judged.
        shares: whether the models know of each other; else each is governed as if it were alone.
    """

    board: Board
    tenants: tuple[Tenant, ...]
    neighbours: tuple[tuple[str, HogSettings], ...] = ()
    seconds: float = 60.0
    settling_s: float = SETTLING_S
    shares: bool = True

    def __post_init__(self) -> None:
        if not self.tenants:
            raise UsageError("There is no model on the board; give one at least.")
        if len({tenant.name for tenant in self.tenants}) < len(self.tenants):
            raise UsageError("Two models on the board have the same name; give each its own.")
        if not 0 <= self.settling_s < self.seconds <= LONGEST_S:
            raise UsageError(
                f"Shares are judged after {self.settling_s:g} s, so simulate more than that with --seconds."
            )


@dataclass(frozen=True, slots=True)
class Drawn:
    """Boards with so many models; each seed draws its own neighbours and conversations.

    Attributes:
        situation: board and neighbours, and of each model the rest.
        n_models: of the same kind.
        weights, priorities: of the first models; where there are fewer, they begin again.
    """

    situation: Situation
    n_models: int
    weights: tuple[float, ...] = (1.0,)
    priorities: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if self.situation.elsewhere_share or self.situation.learning_s:
            raise UsageError("Several models have no stall from elsewhere and no time to learn; leave out both.")

    @property
    def least_bytes(self) -> int:
        """What system and models take without their caches."""
        board, llm = self.situation.board, self.situation.llm
        return board.system_bytes + llm.weights_bytes + self.n_models * llm.runtime_bytes

    def together(self, seed: int) -> Together:
        """The board of a seed."""
        s, tenants = self.situation, []
        for n in range(self.n_models):
            weight, priority = self.weights[n % len(self.weights)], self.priorities[n % len(self.priorities)]
            talk = conversation.draw(s.talk, s.seconds, 1000 * seed + n)
            share = ShareSettings(weight, priority)
            tenants.append(Tenant(f"model {n + 1}", s.llm, s.n_ctx, talk, share, law=s.law, adapt=s.adapt))
        return Together(s.board, tuple(tenants), tuple(s.neighbours_of(seed)), s.seconds)
