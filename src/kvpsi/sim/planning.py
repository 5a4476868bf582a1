"""Which context, how many sessions and which type of cache fit on a machine: arithmetic, without a simulation.

Static: everything has to fit while the neighbours have most. Elastic: it has to fit while they have least, and the
cache can shrink to its floor while they have most. What is kept free (the reserve) has to last until memory is given
back after a neighbour began to grow::

    reserve = rate * delay
    P(killed, each time a neighbour grows) = P(it grows faster than reserve / delay)

A neighbour's rate is taken as log-normal, and no faster than processors can touch fresh memory.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass

from kvpsi.errors import UsageError
from kvpsi.governor.law import LawSettings
from kvpsi.kv import CacheSettings
from kvpsi.sim.boards import MIB, TOUCH_BYTES_S, Board
from kvpsi.sim.floor import Floor
from kvpsi.sim.llms import Llm

RATE_MEDIAN_BYTES_S = 100 * MIB
RATE_SIGMA = 1.0
DELAY_S = 0.05
_SAFE_RESERVE_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Machine:
    """What a model is to share.

    Attributes:
        memory_bytes: all of it, or the limit of the cgroup.
        system_bytes: what kernel and services always have.
        neighbours_bytes: what everybody else has at most.
        quiet_bytes: what they have at least.
        n_cpus: that may touch memory at the same time.
    """

    memory_bytes: int
    system_bytes: int = 0
    neighbours_bytes: int = 0
    quiet_bytes: int = 0
    n_cpus: int = 1

    def __post_init__(self) -> None:
        if self.memory_bytes < 1 or min(self.system_bytes, self.neighbours_bytes, self.quiet_bytes) < 0:
            raise UsageError("Sizes of a machine are 0 bytes or more, and its memory is more than nothing.")
        if self.quiet_bytes > self.neighbours_bytes:
            raise UsageError("Neighbours cannot have more at least than at most; lower --quiet.")
        if self.n_cpus < 1:
            raise UsageError("A machine has one processor at least.")


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits.

    Attributes:
        kind: ``static`` or ``elastic``.
        kv_type: of the cache.
        reserve_bytes: kept free.
        cache_bytes: the largest that the cache may get; 0 or less: the model does not fit.
        context: tokens of one session, as far as the model was trained.
        sessions: so many of ``session_tokens`` each instead.
        beside_tokens: what is left of the context while the neighbours have most.
    """

    kind: str
    kv_type: str
    reserve_bytes: int
    cache_bytes: int
    context: int
    sessions: int
    beside_tokens: int


def rate_exceeded_with(p: float, n_cpus: int) -> float:
    """Bytes a second that a neighbour's growth exceeds with this probability.

    Raises:
        UsageError: it is no probability.
    """
    if not 0 < p < 1:
        raise UsageError(f"--p-kill {p:g} is no probability; give one above 0 and below 1, such as 1e-6.")
    rate = RATE_MEDIAN_BYTES_S * math.exp(RATE_SIGMA * -statistics.NormalDist().inv_cdf(p))
    return min(rate, n_cpus * TOUCH_BYTES_S)


def draw_rate(rng: random.Random, n_cpus: int = 1) -> float:
    """Bytes a second at which one neighbour grows once, of the same distribution."""
    return min(RATE_MEDIAN_BYTES_S * rng.lognormvariate(0.0, RATE_SIGMA), n_cpus * TOUCH_BYTES_S)


def reserve_for(machine: Machine, p_kill: float) -> int:
    """Bytes to keep free, the law's own reserve at least."""
    needed = math.ceil(rate_exceeded_with(p_kill, machine.n_cpus) * DELAY_S)
    return max(needed, LawSettings().low_for(machine.memory_bytes))


def room_beside(llm: Llm, machine: Machine, p_kill: float, n_tokens: int) -> int:
    """Bytes that neighbours may have beside a cache of so many tokens; below 0: it does not even fit alone."""
    taken = machine.system_bytes + llm.weights_bytes + llm.runtime_bytes + reserve_for(machine, p_kill)
    return machine.memory_bytes - taken - llm.cache_bytes(n_tokens)


def fits(llm: Llm, kv_type: str, machine: Machine, p_kill: float, session_tokens: int) -> list[Fit]:
    """Static and elastic; ``llm`` has this type of cache already.

    Raises:
        UsageError: the probability or the tokens make no sense.
    """
    if session_tokens < 1:
        raise UsageError(f"A session of {session_tokens} tokens makes no sense; give 1 or more.")
    reserve = reserve_for(machine, p_kill)
    alone = room_beside(llm, machine, p_kill, 0)
    beside, quiet = alone - machine.neighbours_bytes, alone - machine.quiet_bytes
    floor = llm.cache_bytes(min(llm.n_ctx_train, Floor.of(llm, CacheSettings()).of_a_long_one))
    found = []
    for kind, cache in (("static", beside), ("elastic", quiet if beside >= floor else 0)):
        tokens = max(0, cache // llm.bytes_per_token)
        left = max(0, min(cache, beside) // llm.bytes_per_token)
        context = min(tokens, llm.n_ctx_train)
        found.append(Fit(kind, kv_type, reserve, cache, context, tokens // session_tokens, min(left, llm.n_ctx_train)))
    return found


def safe_tokens(board: Board, llm: Llm, n_ctx: int, beside_bytes: int) -> int:
    """Tokens of a static cache for which there is always room, ``n_ctx`` at most; 0 if there is none.

    What the board has, less the system, 5 % that are kept free, the neighbours at their most (``beside_bytes``),
    weights and runtime.
    """
    taken = board.system_bytes + beside_bytes + llm.weights_bytes + llm.runtime_bytes
    left = board.memory_bytes * (1 - _SAFE_RESERVE_SHARE) - taken
    return max(0, min(n_ctx, int(left) // llm.bytes_per_token))
