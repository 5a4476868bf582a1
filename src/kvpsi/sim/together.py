"""Several governed models on one board: each has the real governor, and they know each other by simulated records."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import simpy

from kvpsi.bench.figures import Figure
from kvpsi.errors import UsageError
from kvpsi.governor.law import LawSettings
from kvpsi.governor.peers import Record
from kvpsi.governor.shares import Claim, ShareSettings, fair_shares
from kvpsi.governor.sharing import Sharing
from kvpsi.hog import HogSettings
from kvpsi.kv import CacheSettings
from kvpsi.sim import conversation, neighbours
from kvpsi.sim.boards import MIB, Board
from kvpsi.sim.cache import SimCache
from kvpsi.sim.controllers import Law
from kvpsi.sim.conversation import Talk, Turn
from kvpsi.sim.engine import SimEngine
from kvpsi.sim.llms import Llm, Speed
from kvpsi.sim.memory import Events, File, Group, Memory
from kvpsi.sim.neighbours import Neighbour
from kvpsi.sim.play import LONGEST_S

SETTLING_S = 10.0
"""Time in which models should have come to their shares."""
TOLERANCE = 0.10
"""By so much of it a model may miss its share."""
SWING_SHARE = 0.02
"""Of a cache's whole size: a limit that turns round by less than this does not swing."""
_SAMPLE_S = 0.25


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
    """

    name: str
    llm: Llm
    n_ctx: int
    turns: Sequence[Turn]
    share: ShareSettings = field(default_factory=ShareSettings)
    speed: Speed | None = None
    settings: CacheSettings = field(default_factory=CacheSettings)
    law: LawSettings = field(default_factory=LawSettings)


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
        board, llm, n_ctx: as for `Tenant`.
        n_models: of the same kind.
        weights, priorities: of the first models; where there are fewer, they begin again.
        neighbours: kinds and the most that each takes, in bytes.
        talk: how conversations are drawn.
        seconds: that are simulated.
        speed: of each model; None: what follows from the board.
        law: constants of the control law of each.
    """

    board: Board
    llm: Llm
    n_ctx: int
    n_models: int
    weights: tuple[float, ...] = (1.0,)
    priorities: tuple[int, ...] = (0,)
    neighbours: tuple[tuple[str, int], ...] = ()
    talk: Talk = field(default_factory=Talk)
    seconds: float = 60.0
    speed: Speed | None = None
    law: LawSettings = field(default_factory=LawSettings)

    @property
    def least_bytes(self) -> int:
        """What system and models take without their caches."""
        return self.board.system_bytes + self.llm.weights_bytes + self.n_models * self.llm.runtime_bytes

    def together(self, seed: int) -> Together:
        """The board of a seed."""
        tenants = []
        for n in range(self.n_models):
            weight, priority = self.weights[n % len(self.weights)], self.priorities[n % len(self.priorities)]
            talk = conversation.draw(self.talk, self.seconds, 1000 * seed + n)
            share = ShareSettings(weight, priority)
            tenants.append(Tenant(f"model {n + 1}", self.llm, self.n_ctx, talk, share, self.speed, law=self.law))
        drawn = tuple(
            (f"{kind} {n}", process)
            for n, (kind, size) in enumerate(self.neighbours, start=1)
            for process in neighbours.processes(kind, size, self.seconds, 1000 * seed + n)
        )
        return Together(self.board, tuple(tenants), drawn, self.seconds)


@dataclass(frozen=True, slots=True)
class TenantOutcome:
    """What came of one model, in bytes.

    Attributes:
        name: whose.
        weight, priority: of its share.
        held_bytes: what its cache held on average, once there had been time to settle, and while memory was short.
        asked_bytes: its fair share of what all held, meanwhile.
        swings: how often its limit turned round in ten seconds, once there had been time to settle.
        held_swings: the same of what it held, which also falls when a conversation ends.
        forgotten_tokens, written_tokens: counts.
        killed: whether it was.
    """

    name: str
    weight: float
    priority: int
    held_bytes: float
    asked_bytes: float
    swings: float
    held_swings: float
    forgotten_tokens: int
    written_tokens: int
    killed: bool

    @property
    def error(self) -> float:
        """By how much of it the share was missed."""
        return abs(self.held_bytes / self.asked_bytes - 1) if self.asked_bytes else 0.0


@dataclass(frozen=True, slots=True)
class TogetherOutcome:
    """What came of all.

    Attributes:
        tenants: of each model.
        killed: names of who was killed, neighbours too.
        stall_s: in which somebody waited for memory.
        neighbours_swings: how often what the neighbours took turned round in ten seconds, which limits have to follow.
        short_share: of the time, once there had been time to settle, in which memory was short: nobody could grow.
        least_headroom_bytes: the least that was left for others.
    """

    tenants: tuple[TenantOutcome, ...]
    killed: tuple[str, ...]
    stall_s: float
    neighbours_swings: float
    short_share: float
    least_headroom_bytes: int


class SimPeers:
    """`kvpsi.governor.peers.Peers` of a simulated board: records of processes that were killed are gone with them."""

    def __init__(self, records: dict[str, tuple[Group, Record]], group: Group) -> None:
        self._records, self._group = records, group

    def exchange(self, record: Record) -> Sequence[Record]:
        """See `kvpsi.governor.peers.Peers`."""
        name = self._group.name
        self._records[name] = (self._group, Record(*_fields(record), name=name))
        return [each for group, each in self._records.values() if group is not self._group and group.alive]

    def close(self) -> None:
        """Be gone."""
        self._records.pop(self._group.name, None)


def _fields(record: Record) -> tuple[float, tuple[str, ...], Claim, int]:
    return record.time_s, record.scopes, record.claim, record.returned_bytes


class _Seat:
    """One model on the board."""

    def __init__(
        self, memory: Memory, tenant: Tenant, weights: File, records: dict[str, tuple[Group, Record]] | None
    ) -> None:
        self.tenant = tenant
        group = self.group = memory.group(tenant.name)
        speed = tenant.speed or Speed.on(memory.board, tenant.llm)
        self.cache = SimCache(memory, group, tenant.llm, tenant.n_ctx, elastic=True, settings=tenant.settings)
        self.engine = SimEngine(memory.env, memory, group, self.cache, weights, speed, tenant.turns)
        self.law = Law(
            tenant.law, sharing=Sharing(tenant.share, SimPeers(records, group)) if records is not None else None
        )
        self.law.attach(memory, self.cache, self.engine)

    def claim(self) -> Claim:
        """What it holds, and what it really wants: what was said, and what is still to be read."""
        cache = self.cache
        if not cache.is_alive:
            return Claim(0, 0, 0, 0, 0)
        status, running = cache.status(), cache.running
        more = self.engine.unread_tokens + (running.forgotten if running is not None else 0)
        wanted = min(status.capacity_bytes, status.used_bytes + cache.llm.cache_bytes(more))
        share = self.tenant.share
        return Claim(status.used_bytes, status.used_bytes, status.floor_bytes, wanted, 0, share.weight, share.priority)

    @property
    def is_short(self) -> bool:
        """Whether headroom is at or below the mark from which on it may grow."""
        governor = self.law.governor
        if governor is None or governor.reading is None:
            return False
        room = governor.reading.headroom
        return self.cache.is_alive and room.available_bytes <= 1.1 * governor.settings.high_for(room.limit_bytes)

    def limit_bytes(self) -> int:
        """What it may hold."""
        governor = self.law.governor
        state = governor.state if governor is not None else None
        capacity = self.cache.status().capacity_bytes
        return capacity if state is None or state.limit_bytes is None else state.limit_bytes


def play_together(setup: Together) -> TogetherOutcome:
    """Simulate it."""
    env = simpy.Environment()
    memory = Memory(env, setup.board)
    files = {tenant.llm.name: File(tenant.llm.name, tenant.llm.weights_bytes) for tenant in setup.tenants}
    records: dict[str, tuple[Group, Record]] | None = {} if setup.shares else None
    seats = [_Seat(memory, tenant, files[tenant.llm.name], records) for tenant in setup.tenants]
    for seat in seats:
        seat.engine.start()
    neighbours = [Neighbour(env, memory, settings, name) for name, settings in setup.neighbours]
    for neighbour in neighbours:
        neighbour.start()
    looks: list[_Look] = []
    headrooms: list[int] = []
    env.process(_watch(memory, seats, setup.settling_s, looks, headrooms))
    env.run(until=setup.seconds)
    least = SWING_SHARE * min(seat.cache.status().capacity_bytes for seat in seats)
    return TogetherOutcome(
        tuple(_outcome(n, seat, looks, setup.seconds - setup.settling_s) for n, seat in enumerate(seats)),
        tuple(memory.killed),
        memory.stall.total_s,
        10.0 / (setup.seconds - setup.settling_s) * swings([look.beside for look in looks], least),
        statistics.fmean(look.short for look in looks),
        min(headrooms),
    )


@dataclass(frozen=True, slots=True)
class _Look:
    """What each model held, its share of that, its limit, and what the neighbours took, in bytes; and whether memory
    was short."""

    short: bool
    beside: int
    held: list[int]
    asked: list[int]
    limits: list[int]


def _watch(
    memory: Memory,
    seats: Sequence[_Seat],
    settling_s: float,
    looks: list[_Look],
    headrooms: list[int],
) -> Events:
    while True:
        yield memory.env.timeout(_SAMPLE_S)
        headrooms.append(memory.free_bytes + memory.idle_file_bytes)
        if memory.env.now < settling_s:
            continue
        claims, short = [seat.claim() for seat in seats], any(seat.is_short for seat in seats)
        held = [claim.used_bytes for claim in claims]
        own = [seat.group for seat in seats]
        beside = sum(group.anon_bytes + group.swapped_bytes for group in memory.groups if group not in own)
        limits = [seat.limit_bytes() for seat in seats]
        looks.append(_Look(short, beside, held, fair_shares(sum(held), claims), limits))


def _outcome(n: int, seat: _Seat, looks: Sequence[_Look], seconds: float) -> TenantOutcome:
    held, limits = [look.held[n] for look in looks], [look.limits[n] for look in looks]
    judged = [look for look in looks if look.short] or looks[-1:]
    least = SWING_SHARE * seat.cache.status().capacity_bytes
    return TenantOutcome(
        name=seat.tenant.name,
        weight=seat.tenant.share.weight,
        priority=seat.tenant.share.priority,
        held_bytes=statistics.fmean(look.held[n] for look in judged),
        asked_bytes=statistics.fmean(look.asked[n] for look in judged),
        swings=10.0 / seconds * swings(limits, least),
        held_swings=10.0 / seconds * swings(held, least),
        forgotten_tokens=seat.cache.forgotten_tokens,
        written_tokens=seat.engine.work.written,
        killed=not seat.cache.is_alive,
    )


def play_drawn(plan: Drawn, seed: int) -> TogetherOutcome:
    """One seed."""
    return play_together(plan.together(seed))


def row(name: str, outcomes: Sequence[TenantOutcome]) -> dict[str, object]:
    """One model in a table: means over the seeds, and the worst of shares and swings."""

    def mean(value: Callable[[TenantOutcome], float]) -> float:
        return statistics.fmean(value(each) for each in outcomes)

    return {
        "model": name,
        "weight": outcomes[0].weight,
        "priority": outcomes[0].priority,
        "held_mib": round(mean(lambda each: each.held_bytes) / MIB, 1),
        "asked_mib": round(mean(lambda each: each.asked_bytes) / MIB, 1),
        "worst_error": round(max(each.error for each in outcomes), 3),
        "most_swings": round(max(each.swings for each in outcomes), 2),
        "tokens_lost": round(mean(lambda each: each.forgotten_tokens), 1),
        "tokens_written": round(mean(lambda each: each.written_tokens), 1),
        "killed": sum(each.killed for each in outcomes),
    }


def swings(values: Sequence[float], least: float) -> int:
    """How often a series turns round: goes up after it went down, or down after it went up, by more than ``least``."""
    count, direction = 0, 0
    peak = trough = values[0] if values else 0.0
    for value in values:
        peak, trough = max(peak, value), min(trough, value)
        if direction <= 0 and value - trough > least:
            count += direction < 0
            direction, peak = 1, value
        elif direction >= 0 and peak - value > least:
            count += direction > 0
            direction, trough = -1, value
    return count


def figures(outcomes: Sequence[TogetherOutcome]) -> list[Figure]:
    """Over all seeds: the worst share, the most swings, alone and beyond those that neighbours made, and who was
    killed."""
    tenants = [tenant for outcome in outcomes for tenant in outcome.tenants]
    own_swings = [each.swings - outcome.neighbours_swings for outcome in outcomes for each in outcome.tenants]
    return [
        Figure("worst_share_error", max(tenant.error for tenant in tenants), "", TOLERANCE),
        Figure("most_swings", max(tenant.swings for tenant in tenants), "in 10 s"),
        Figure("most_swings_beyond_neighbours", max(0.0, *own_swings), "in 10 s", 1.0),
        Figure("short_share", statistics.fmean(outcome.short_share for outcome in outcomes), ""),
        Figure("killed", float(sum(len(outcome.killed) for outcome in outcomes)), "", 0.0, "=="),
        Figure("stall_s", statistics.fmean(outcome.stall_s for outcome in outcomes), "s"),
        Figure("least_headroom_mib", min(o.least_headroom_bytes for o in outcomes) / MIB, "MiB"),
    ]
