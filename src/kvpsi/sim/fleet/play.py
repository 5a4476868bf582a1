"""One simulation of a fleet: its boards, who sizes their caches, and who routes requests to them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvpsi.bench.figures import quantile
from kvpsi.errors import UsageError
from kvpsi.pressure.fake import ManualClock
from kvpsi.sim.controllers import Law, Static
from kvpsi.sim.fleet.engines import Engines
from kvpsi.sim.fleet.memories import MODEL, Memories
from kvpsi.sim.fleet.routers import Router, View, router_named
from kvpsi.sim.fleet.server import Server, World
from kvpsi.sim.fleet.situation import GIVE_UP_S, End, Fleet, Request
from kvpsi.sim.many import SAFE

TICK_S = 0.1
_AFTER_S = 120.0  # neighbours go on for so long after the last request came
_QUEUE_TICKS = 5

GOVERNED = Law.name
CONTROLLERS = (GOVERNED, SAFE, Static.name)
"""Who sizes a board's cache: the law; nobody, but so that it always fits; nobody."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it. Times of requests count from when they came to the router.

    Attributes:
        controller, router, seed: whose.
        requests, answered, refused, failed: all that came; and of them those that were answered, turned away by two
            boards, and broken off, as their board was killed or took too long.
        retried: sent to a second board.
        latencies_s: to the last token, of those that were answered, in order of size.
        first_tokens_s: to the first one, of all that got one.
        models_killed, neighbours_killed: by the kernel.
        forgotten_tokens: that were lost.
        paused_tokens: that were read again, as answers were paused.
        sent_short: requests that were sent to boards with less headroom than the law's high mark, and of
        sent: all that were sent anywhere.
        stall_share: of the time of all boards, in which something waited for memory.
        events: what was done for single boards: looks, requests sent, answers begun or looked for, neighbours' steps.
    """

    controller: str
    router: str
    seed: int
    requests: int
    answered: int
    refused: int
    failed: int
    retried: int
    latencies_s: tuple[float, ...]
    first_tokens_s: tuple[float, ...]
    models_killed: int
    neighbours_killed: int
    forgotten_tokens: int
    paused_tokens: int
    sent_short: int
    sent: int
    stall_share: float
    events: int

    def latency_s(self, share: float) -> float:
        """The latency that this share of all answers did not exceed."""
        return quantile(self.latencies_s, share)

    def first_token_s(self, share: float) -> float:
        """The same of the first token."""
        return quantile(self.first_tokens_s, share)


def play(fleet: Fleet, controller: str, router: str, seed: int) -> Outcome:
    """Simulate it; the boards, neighbours and requests of a seed are the same for all controllers and routers.

    Raises:
        UsageError: there is no such controller or router.
    """
    if controller not in CONTROLLERS:
        raise UsageError(f"Controllers of a fleet are {', '.join(CONTROLLERS)}, not {controller!r}.")
    run = Run(fleet, controller, router_named(router, seed), seed)
    run.until_all_ended()
    return run.outcome(seed)


class Run:
    """The state of one simulation, and what happens at each tick.

    Args:
        fleet: what there is.
        controller: who sizes the caches.
        router: who sends requests where.
        seed: of neighbours and requests.

    Attributes:
        world: what there is on all boards.
        servers: of each board.
        view: what the router knows.
        killed: boards, and who was killed there: a neighbour's number or `MODEL`.

    Raises:
        UsageError: no cache is safe.
    """

    def __init__(self, fleet: Fleet, controller: str, router: Router, seed: int) -> None:
        n_ctx = fleet.safe_ctx() if controller == SAFE else fleet.n_ctx
        if n_ctx < 1:
            raise UsageError(
                "Even without a cache this model does not fit beside the neighbours at most; take smaller ones."
            )
        self.fleet, self.controller, self.router = fleet, controller, router
        traces = fleet.traces(seed, fleet.seconds + _AFTER_S)
        self.world = World(
            fleet,
            ManualClock(),
            Memories(fleet.board, fleet.llm, fleet.n_boards, len(fleet.neighbours), traces),
            Engines(fleet.n_boards, fleet.parallel, n_ctx, fleet.llm, fleet.speed),
            fleet.requests(seed),
        )
        self.view = View(fleet.n_boards, fleet.parallel)
        self.servers = [self._new_server(board) for board in range(fleet.n_boards)]
        self.due_s = np.zeros(fleet.n_boards)  # when each board's monitor looks again
        self.back_s: dict[int, float] = {}  # when killed models run again
        self.waiting: set[int] = set()  # boards where somebody waits
        self.changed: set[int] = set()  # boards where somebody came, or a place became free
        self.to_come = deque(self.world.requests)
        self.open: deque[Request] = deque()
        self.killed: list[tuple[int, int]] = []
        self.tick = self.events = self.sent = self.sent_short = self.retried = 0
        self.high_bytes = fleet.law.high_for(fleet.board.memory_bytes)

    def _new_server(self, board: int) -> Server:
        return Server(board, self.world, is_governed=self.controller == GOVERNED)

    # -- time ----------------------------------------------------------------------------------------------------

    def until_all_ended(self) -> None:
        """Tick by tick."""
        while self.to_come or self.open:
            self.step()

    def step(self) -> None:
        """One tick: what happened in it, and then what is decided."""
        self.tick += 1
        self.world.clock.now_s = self.tick * TICK_S
        self._use_memory()
        self._compute()
        if self.controller == GOVERNED:
            self._look()
        self._poll()
        self._route()
        self._give_up()
        self._begin()

    def _use_memory(self) -> None:
        """Who needs what, who is killed, and who is back."""
        world, engines = self.world, self.world.engines
        memories, now_s = world.memories, world.clock.now_s
        for board in [board for board, back_s in self.back_s.items() if back_s <= now_s]:
            del self.back_s[board]
            memories.start(board)
            engines.limit_tokens[board], engines.pressed[board] = engines.n_ctx, False
            self.servers[board] = self._new_server(board)
            self.due_s[board] = now_s
        used_bytes = engines.used_tokens() * engines.llm.bytes_per_token
        whole_bytes = np.where(memories.is_up, float(engines.n_ctx * engines.llm.bytes_per_token), 0.0)
        cache_bytes = used_bytes if self.controller == GOVERNED else whole_bytes
        for board, who in memories.advance(now_s, TICK_S, used_bytes, cache_bytes):
            self.killed.append((board, who))
            if who == MODEL:
                self.back_s[board] = now_s + self.fleet.llm.weights_bytes / self.fleet.board.read_bytes_s
                self.waiting.discard(board)
                for request in self.servers[board].stop():
                    if request.first_s is None:
                        self._turned_away(request)
                    else:
                        self._end(request, "failed")

    def _compute(self) -> None:
        """A tick of all models, beside what their memory lets them wait."""
        world, engines, memories = self.world, self.world.engines, self.world.memories
        is_busy = (engines.request >= 0).any(axis=1)
        most_bytes = TICK_S * self.fleet.board.read_bytes_s
        read_bytes = np.where(is_busy, np.minimum(memories.missing_bytes, most_bytes), 0.0)
        memories.take_in(read_bytes)
        ticked = engines.advance(TICK_S, read_bytes / self.fleet.board.read_bytes_s, memories.wait_s)
        memories.note_uses(ticked.uses)
        world.stall_s += TICK_S * (1 - (1 - ticked.stall_share) * (1 - memories.stall_share))
        for board, place in ticked.first:
            self.servers[board].note_first_token(place)
        for board, place in ticked.ended:
            self._end(self.servers[board].end(place), "answered")
            self.changed.add(board)
        world.floor_tokens = engines.floor_tokens()

    def _look(self) -> None:
        """Have all governors decide that are due, and all caches hold no more than that."""
        engines, memories, now_s = self.world.engines, self.world.memories, self.world.clock.now_s
        is_due = (self.due_s <= now_s + TICK_S / 2) & memories.is_up
        if not self.to_come:  # what nobody asks of any more cannot change anything
            is_due &= (engines.request >= 0).any(axis=1) | self._has_waiting()
        for board in np.flatnonzero(is_due).tolist():
            self.events += 1
            self.due_s[board] = now_s + self.servers[board].look()
        for board in np.flatnonzero(engines.used_tokens() > engines.allowed_tokens(self.world.floor_tokens)).tolist():
            self.servers[board].shrink()
            self.changed.add(board)

    def _has_waiting(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        found = np.zeros(self.fleet.n_boards, dtype=bool)
        found[list(self.waiting)] = True
        return found

    # -- requests ------------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        """The router asks a part of all boards at each tick, so that it has asked each one in its period."""
        n_parts = max(1, round(self.fleet.poll_s / TICK_S))
        asked = slice(self.tick % n_parts, None, n_parts)
        view, is_up = self.view, self.world.memories.is_up
        view.limit_tokens[asked] = self.world.engines.allowed_tokens(self.world.floor_tokens)[asked]
        for board in range(self.fleet.n_boards)[asked]:
            server = self.servers[board]
            view.pressure[board] = server.pressure
            view.is_ready[board] = bool(is_up[board]) and not server.is_full

    def _route(self) -> None:
        """Send what came since the last tick."""
        while self.to_come and self.to_come[0].asked_s <= self.world.clock.now_s:
            request = self.to_come.popleft()
            self.open.append(request)
            self._send(request, self.router.choose(request, self.view))

    def _send(self, request: Request, board: int) -> None:
        self.events += 1
        self.sent += 1
        self.sent_short += bool(self.world.memories.available_bytes[board] < self.high_bytes)
        request.tries, request.board = request.tries + 1, board
        self.view.in_flight[board] += 1
        if self.world.memories.is_up[board] and self.servers[board].offer(request):
            self.changed.add(board)
        else:
            self._turned_away(request)

    def _turned_away(self, request: Request) -> None:
        """By one board: send it to another, by the second: that is the end."""
        if request.tries > 1:
            self._end(request, "refused")
            return
        self.view.in_flight[request.board] -= 1
        self.retried += 1
        request.written = 0.0
        self._send(request, self.router.choose(request, self.view, request.board))

    def _end(self, request: Request, end: End) -> None:
        assert request.end is None
        self.view.in_flight[request.board] -= 1
        request.end, request.ended_s = end, self.world.clock.now_s

    def _give_up(self) -> None:
        """Clients do not wait for ever."""
        while self.open and (self.open[0].end or self.open[0].asked_s + GIVE_UP_S <= self.world.clock.now_s):
            request = self.open.popleft()
            if request.end is None:
                self.servers[request.board].cancel(request)
                self._end(request, "failed")

    def _begin(self) -> None:
        """Begin what may be begun: at once where somebody came or a place became free, else twice a second."""
        part = self.tick % _QUEUE_TICKS
        due = self.changed | {board for board in self.waiting if board % _QUEUE_TICKS == part}
        self.changed = set()
        for board in sorted(due):
            if not self.world.memories.is_up[board]:
                continue
            self.events += 1
            server = self.servers[board]
            for request in server.begin():
                self._turned_away(request)
            if len(server.admission):
                self.waiting.add(board)
            else:
                self.waiting.discard(board)

    # -- the end -------------------------------------------------------------------------------------------------

    def outcome(self, seed: int) -> Outcome:
        """What came of it."""
        requests, engines = self.world.requests, self.world.engines
        models_killed = sum(who == MODEL for _, who in self.killed)
        boards_s = self.fleet.n_boards * max(TICK_S, self.world.clock.now_s)

        def times_s(ends: Sequence[tuple[float, float | None]]) -> tuple[float, ...]:
            return tuple(sorted(end_s - asked_s for asked_s, end_s in ends if end_s is not None))

        return Outcome(
            controller=self.controller,
            router=self.router.name,
            seed=seed,
            requests=len(requests),
            answered=sum(request.end == "answered" for request in requests),
            refused=sum(request.end == "refused" for request in requests),
            failed=sum(request.end == "failed" for request in requests),
            retried=self.retried,
            latencies_s=times_s([(each.asked_s, each.ended_s) for each in requests if each.end == "answered"]),
            first_tokens_s=times_s([(each.asked_s, each.first_s) for each in requests]),
            models_killed=models_killed,
            neighbours_killed=len(self.killed) - models_killed,
            forgotten_tokens=int(engines.forgotten.sum()),
            paused_tokens=self.world.paused_tokens,
            sent_short=self.sent_short,
            sent=self.sent,
            stall_share=math.fsum(self.world.stall_s.tolist()) / boards_s,
            events=self.events + self.world.memories.n_changes,
        )
