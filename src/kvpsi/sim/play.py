"""One simulation: a board, a model and who controls its cache, neighbours, and what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import simpy

from kvpsi.errors import UsageError
from kvpsi.hog import HogSettings
from kvpsi.kv import CacheSettings
from kvpsi.sim.boards import Board
from kvpsi.sim.cache import SimCache
from kvpsi.sim.controllers import Controller
from kvpsi.sim.conversation import Turn
from kvpsi.sim.engine import SimEngine
from kvpsi.sim.llms import Llm, Speed
from kvpsi.sim.memory import Events, File, Memory
from kvpsi.sim.neighbours import Neighbour

_SAMPLE_S = 0.5
LONGEST_S = 1e6


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated.

    Attributes:
        board: the machine.
        llm: the model.
        n_ctx: tokens of its cache.
        turns: what is asked of it.
        neighbours: by name, processes that take memory, too.
        seconds: the longest that is simulated.
        speed: of the model; None: what follows from the board.
        settings: what eviction leaves alone.
        ends_with_turns: the simulation is over when all that was asked is answered, or the model is dead.
        learning_s: after which it is told what was lost until then.
        elsewhere: (seconds, how long) of stall that has nothing to do with the board's memory, in order of time: of
            somebody who has a limit of their own.
    """

    board: Board
    llm: Llm
    n_ctx: int
    turns: Sequence[Turn]
    neighbours: Sequence[tuple[str, HogSettings]] = ()
    seconds: float = 60.0
    speed: Speed | None = None
    settings: CacheSettings = field(default_factory=CacheSettings)
    ends_with_turns: bool = False
    learning_s: float = 0.0
    elsewhere: Sequence[tuple[float, float]] = ()

    def __post_init__(self) -> None:
        if self.n_ctx < 1 or not 0 < self.seconds <= LONGEST_S:
            raise UsageError("A simulation needs a context of one token at least, and a time above 0 s.")
        if not 0 <= self.learning_s < self.seconds:
            raise UsageError("The time to learn is 0 s or more, and less than the whole.")


@dataclass(frozen=True, slots=True)
class Sample:
    """How things stood at a time: bytes in use on the board, of the cache in memory, and in swap; seconds of stall of
    the board so far."""

    time_s: float
    usage_bytes: int
    cache_bytes: int
    swapped_bytes: int
    stall_s: float


@dataclass(frozen=True, slots=True)
class Lost:
    """What was lost until a time.

    Attributes:
        stall_s: the model's and its neighbours', each for itself.
        waited_s: in which the model waited for room in the cache.
        missing_tokens: that had been forgotten, of each answer when it was begun.
        parked_tokens: of conversations that were not going on.
        killed: processes.
    """

    stall_s: float
    waited_s: float
    missing_tokens: int
    parked_tokens: int
    killed: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        controller: who decided.
        killed: names of who was killed.
        peak_bytes: the most of the board's memory that was used.
        stall_s, neighbours_stall_s: in which somebody waited for memory, and one of the neighbours did.
        forgotten_tokens, reread_tokens, refused_tokens, parked_tokens, written_tokens: counts.
        shed: (seconds, tokens) that were forgotten so that the cache gets smaller; the rest of what was forgotten made
            room for new tokens.
        restarts: conversations that outgrew the context and began anew.
        longest_context: tokens that one conversation had at most in the cache.
        busy_s: in which the model had something to do.
        samples: twice a second.
        lost, lost_at_first: what was lost in all, and of that until ``learning_s`` had passed.
    """

    controller: str
    killed: tuple[str, ...]
    peak_bytes: int
    stall_s: float
    neighbours_stall_s: float
    forgotten_tokens: int
    shed: tuple[tuple[float, int], ...]
    reread_tokens: int
    refused_tokens: int
    parked_tokens: int
    written_tokens: int
    restarts: int
    longest_context: int
    busy_s: float
    samples: tuple[Sample, ...]
    lost: Lost
    lost_at_first: Lost

    @property
    def tok_s(self) -> float:
        """Tokens written in a second in which there was something to do."""
        return self.written_tokens / self.busy_s if self.busy_s else 0.0


def play(setup: Setup, controller: Controller) -> Outcome:
    """Simulate it."""
    env = simpy.Environment()
    memory = Memory(env, setup.board)
    group = memory.group("model")
    weights = File("weights", setup.llm.weights_bytes)
    cache = SimCache(memory, group, setup.llm, setup.n_ctx, elastic=controller.elastic, settings=setup.settings)
    speed = setup.speed or Speed.on(setup.board, setup.llm)
    engine = SimEngine(env, memory, group, cache, weights, speed, setup.turns)
    neighbours = [Neighbour(env, memory, settings, name) for name, settings in setup.neighbours]
    controller.attach(memory, cache, engine)
    engine.start()
    for neighbour in neighbours:
        neighbour.start()
    samples: list[Sample] = []
    env.process(_stall(env, memory, setup.elsewhere))
    env.process(_watch(env, memory, cache, samples))

    def lost() -> Lost:
        stall_s = group.stall.total_s + sum(neighbour.stall_s for neighbour in neighbours)
        work = engine.work
        return Lost(stall_s, work.waited_s, work.missing, cache.parked_tokens, len(memory.killed))

    lost_at_first = lost()
    if setup.learning_s > 0:
        env.run(until=setup.learning_s)
        lost_at_first = lost()
    over = env.timeout(setup.seconds - setup.learning_s)
    env.run(until=env.any_of([over, group.process]) if setup.ends_with_turns and group.process else over)
    samples.append(_sample(env, memory, cache))
    return Outcome(
        controller=controller.name,
        killed=tuple(memory.killed),
        peak_bytes=memory.peak_bytes,
        stall_s=memory.stall.total_s,
        neighbours_stall_s=sum(neighbour.stall_s for neighbour in neighbours),
        forgotten_tokens=cache.forgotten_tokens,
        shed=tuple(cache.shed),
        reread_tokens=engine.work.reread,
        refused_tokens=engine.work.refused,
        parked_tokens=cache.parked_tokens,
        written_tokens=engine.work.written,
        restarts=engine.work.restarts,
        longest_context=engine.work.longest_context,
        busy_s=engine.work.busy_s,
        samples=tuple(samples),
        lost=lost(),
        lost_at_first=lost_at_first,
    )


def _stall(env: simpy.Environment, memory: Memory, elsewhere: Sequence[tuple[float, float]]) -> Events:
    for at_s, lasts_s in elsewhere:
        yield env.timeout(max(0.0, at_s - env.now))
        memory.stall.begin()
        yield env.timeout(lasts_s)
        memory.stall.end()


def _watch(env: simpy.Environment, memory: Memory, cache: SimCache, samples: list[Sample]) -> Events:
    while True:
        samples.append(_sample(env, memory, cache))
        yield env.timeout(_SAMPLE_S)


def _sample(env: simpy.Environment, memory: Memory, cache: SimCache) -> Sample:
    resident = cache.resident_bytes if cache.is_alive else 0
    return Sample(float(env.now), memory.usage_bytes, resident, memory.swapped_bytes, memory.stall.total_s)
