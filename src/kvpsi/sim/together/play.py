"""One simulation of several governed models on one board."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import simpy

from kvpsi.governor.peers import Record
from kvpsi.governor.shares import Claim, fair_shares
from kvpsi.governor.sharing import Sharing
from kvpsi.sim.cache import SimCache
from kvpsi.sim.controllers import Law
from kvpsi.sim.engine import SimEngine
from kvpsi.sim.llms import Speed
from kvpsi.sim.memory import Events, File, Group, Memory
from kvpsi.sim.neighbours import Neighbour
from kvpsi.sim.together.peers import SimPeers
from kvpsi.sim.together.situation import Tenant, Together
from kvpsi.sim.together.swings import SWING_SHARE, swings

_SAMPLE_S = 0.25


@dataclass(frozen=True, slots=True)
class TenantOutcome:
    """What came of one model, in bytes.

    Attributes:
        name: whose.
        weight, priority: of its share.
        held_bytes: what its cache held on average, once there had been time to settle, and while memory was short.
        asked_bytes: its fair share of what all held, meanwhile.
        swings: how often its limit turned round in ten seconds, once there had been time to settle.
        forgotten_tokens, written_tokens: counts.
        killed: whether it was.
    """

    name: str
    weight: float
    priority: int
    held_bytes: float
    asked_bytes: float
    swings: float
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
        sharing = Sharing(tenant.share, SimPeers(records, group)) if records is not None else None
        self.law = Law(tenant.law, sharing=sharing, adapt=tenant.adapt)
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
    limits = [look.limits[n] for look in looks]
    judged = [look for look in looks if look.short] or looks[-1:]
    least = SWING_SHARE * seat.cache.status().capacity_bytes
    return TenantOutcome(
        name=seat.tenant.name,
        weight=seat.tenant.share.weight,
        priority=seat.tenant.share.priority,
        held_bytes=statistics.fmean(look.held[n] for look in judged),
        asked_bytes=statistics.fmean(look.asked[n] for look in judged),
        swings=10.0 / seconds * swings(limits, least),
        forgotten_tokens=seat.cache.forgotten_tokens,
        written_tokens=seat.engine.work.written,
        killed=not seat.cache.is_alive,
    )
