"""What decides on one board of a fleet: kvpsi's governor with its law, and its admission, both as in `kvpsi serve`."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kvpsi.admission import Admission, Load, Places, Pressure, TurnedAwayError
from kvpsi.governor import Governor
from kvpsi.pressure.fake import ManualClock
from kvpsi.pressure.rates import Slope
from kvpsi.pressure.reading import Headroom, Reading, Stall, StallLine, Swap
from kvpsi.serving.step import EVEN_PIECE_TOKENS
from kvpsi.sim.fleet.engines import Engines
from kvpsi.sim.fleet.memories import Memories
from kvpsi.sim.fleet.situation import MOST_ANSWER_TOKENS, Fleet, Floats, Request
from kvpsi.status import CacheStatus

_LOOKED_AT, _FIRST_TOKEN_WEIGHT = 16, 0.2  # as in kvpsi.serving.engine; a test compares them
_CALM = Stall()


@dataclass(slots=True)
class World:
    """What all servers of a fleet share.

    Attributes:
        fleet: what is simulated.
        clock: simulated time.
        memories, engines: of all boards.
        requests: by number.
        stall_s, floor_tokens: of each board: stall so far, and how small its cache may get at this tick.
        paused_tokens: that are read again, as their answers were paused.
    """

    fleet: Fleet
    clock: ManualClock
    memories: Memories
    engines: Engines
    requests: list[Request]
    stall_s: Floats = field(init=False)
    floor_tokens: Floats = field(init=False)
    paused_tokens: int = 0

    def __post_init__(self) -> None:
        self.stall_s = np.zeros(self.fleet.n_boards)
        self.floor_tokens = self.engines.floor_tokens()


class Server:
    """One board: its cache as a governor governs it (`kvpsi.governor.Governed`), what can be sensed there
    (`kvpsi.pressure.PressureSource`), its queue and its places.

    Args:
        board: its number.
        world: what it shares with the others.
        is_governed: the law decides what its cache may hold; else it may hold all of it, and nothing is sensed.

    Attributes:
        running: places that are taken, in the order in which they were.
        pressure: share of the time between the last two looks in which something waited for memory.
        admission: the queue.
        governor: None where nothing is governed.
    """

    def __init__(self, board: int, world: World, *, is_governed: bool) -> None:
        self.board, self._world = board, world
        self.running: list[int] = []
        self.pressure = 0.0
        self.admission: Admission[Request] = Admission(
            world.fleet.most_waiting, None, world.clock, self._places, self._load
        )
        self._first_token_s: float | None = None
        self._began_s: dict[int, float] = {}
        self._looked_s, self._stall_s = world.clock.now_s, float(world.stall_s[board])
        self._slope = Slope()
        fleet = world.fleet
        self.governor = Governor(self, self, settings=fleet.law, adapt=fleet.adapt) if is_governed else None

    # -- requests ------------------------------------------------------------------------------------------------

    def offer(self, request: Request) -> bool:
        """Have a request wait here; false if it was turned away."""
        world = self._world
        if request.n_prompt >= world.engines.n_ctx:
            return False
        request.board, request.arrived_s = self.board, world.clock.now_s
        request.begin_by_s = request.arrived_s + world.fleet.queue_timeout_s
        try:
            displaced = self.admission.offer(request)
        except TurnedAwayError:
            return False
        assert displaced is None  # all are as urgent
        return True

    @property
    def is_full(self) -> bool:
        """Whether the next one would be turned away, as ``/ready`` tells."""
        return len(self.admission) >= self.admission.most and self.admission.is_full

    def begin(self) -> list[Request]:
        """Begin as many as may be begun; those that waited too long."""
        late = [request for request, _ in self.admission.overdue()]
        if len(self.admission):
            most = min(self._world.fleet.parallel, self.admission.limit())
            while len(self.running) < most and (request := self._next()) is not None:
                self.admission.take(request)
                self._begin(request)
        return late

    def _next(self) -> Request | None:
        """The first of those who wait that there is room for."""
        engines = self._world.engines
        room = engines.n_ctx
        if self.running:
            allowed = max(engines.limit_tokens.item(self.board), self._world.floor_tokens.item(self.board))
            room = int(min(engines.n_ctx, allowed) - engines.held[self.board].sum())
        for request in self.admission.first_ones(_LOOKED_AT):
            if not self.running or room > request.n_prompt + request.written:
                return request
        return None

    def _begin(self, request: Request) -> None:
        engines = self._world.engines
        n_answer = min(request.n_answer, engines.n_ctx - request.n_prompt)
        place = engines.begin(
            self.board,
            request.number,
            to_read=request.n_prompt + int(request.written),
            to_write=n_answer - request.written,
            written=request.written,
        )
        self.running.append(place)
        self._began_s[place] = self._world.clock.now_s
        self.admission.costs.note_begun(request.n_prompt, 0)

    def note_first_token(self, place: int) -> None:
        """The first token of an answer is there."""
        request = self._request_at(place)
        request.first_s = self._world.clock.now_s
        n_read = max(EVEN_PIECE_TOKENS, request.n_prompt)
        taken_s = (request.first_s - self._began_s[place]) / n_read
        before = self._first_token_s
        self._first_token_s = taken_s if before is None else before + _FIRST_TOKEN_WEIGHT * (taken_s - before)

    def end(self, place: int) -> Request:
        """An answer is complete."""
        engines, costs, at = self._world.engines, self.admission.costs, (self.board, place)
        request = self._request_at(place)
        costs.note_prompt(request.n_prompt, engines.read_s.item(at))
        costs.note_answers(request.n_answer, engines.write_s.item(at))
        costs.note_end(request.n_answer)
        self._free(place)
        return request

    def cancel(self, request: Request) -> None:
        """A client has ended the connection."""
        if self.admission.discard(request):
            return
        for place in self.running:
            if self._request_at(place) is request:
                self._free(place)
                return

    def stop(self) -> list[Request]:
        """The process was killed: all that it had to do."""
        found = [*self.admission, *(self._request_at(place) for place in self.running)]
        for place in list(self.running):
            self._free(place)
        return found

    def shrink(self) -> None:
        """Hold no more than is allowed: the answer that began last is paused, as long as there is another; of a single
        one tokens are forgotten (docs/server.md)."""
        world, engines = self._world, self._world.engines
        allowed = min(engines.n_ctx, max(engines.limit_tokens.item(self.board), world.floor_tokens.item(self.board)))
        while (excess := float(engines.held[self.board].sum()) - allowed) > 0:
            if len(self.running) < 2:
                if self.running and engines.limit_tokens.item(self.board) < engines.n_ctx:
                    engines.forget(self.board, self.running[0], excess)
                return
            place = self.running.pop()
            request = self._request_at(place)
            request.written = engines.written.item((self.board, place))
            request.begin_by_s = float("inf")  # it was begun in time
            world.paused_tokens += engines.give_up(self.board, place)
            self.admission.put_back(request)

    def _request_at(self, place: int) -> Request:
        return self._world.requests[self._world.engines.request.item((self.board, place))]

    def _free(self, place: int) -> None:
        self._world.engines.free(self.board, place)
        self.running.remove(place)

    def _places(self) -> Places:
        """See `kvpsi.admission.Admission`."""
        engines, costs = self._world.engines, self.admission.costs
        work_s = 0.0
        for place in self.running:
            at = self.board, place
            left = costs.left_to_write(int(engines.written.item(at)), MOST_ANSWER_TOKENS)
            work_s += costs.rest_s(engines.to_read.item(at), left)
        return Places(len(self.running), self._world.fleet.parallel, work_s)

    def _load(self) -> Load:
        """See `kvpsi.admission.Admission`."""
        engines = self._world.engines
        n_writing = sum(engines.to_read.item((self.board, place)) <= 0 for place in self.running)
        return Load(
            time_s=self._world.clock.now_s,
            running=len(self.running),
            writing=n_writing,
            parallel=self._world.fleet.parallel,
            waiting=len(self.admission),
            next_wait_s=self.admission.next_wait_s(),
            token_s=engines.token_s.item(self.board) if n_writing else None,
            first_token_s=self._first_token_s,
            pressure=Pressure(memory_stall=self.pressure),
        )

    # -- the governor's cache ------------------------------------------------------------------------------------

    def status(self) -> CacheStatus:
        """All answers but the first can be paused, so that nothing is lost with them."""
        engines, board = self._world.engines, self.board
        per_token = engines.llm.bytes_per_token
        held = engines.held[board].tolist()
        used = int(sum(held))
        first = int(held[self.running[0]]) if self.running else 0
        return CacheStatus(
            capacity_bytes=engines.n_ctx * per_token,
            used_bytes=used * per_token,
            floor_bytes=int(self._world.floor_tokens.item(board)) * per_token,
            returned_bytes=int(engines.given_tokens.item(board)) * per_token,
            lossless_bytes=(used - first) * per_token,
            forgotten_bytes=int(engines.forgotten.item(board)) * per_token,
        )

    def set_limit(self, limit_bytes: int, chunk_tokens: int | None) -> None:
        """It holds from the next tick on."""
        engines = self._world.engines
        engines.limit_tokens[self.board] = limit_bytes // engines.llm.bytes_per_token
        engines.pressed[self.board] = chunk_tokens is not None

    def give_now(self) -> int | None:
        """Nothing is held while nobody is being answered."""
        return None if self.running else 0

    def interrupt(self) -> bool:
        """Room is made at the end of the tick in any case."""
        return False

    # -- the governor's senses -----------------------------------------------------------------------------------

    def look(self) -> float:
        """Sense and decide once; after how many seconds the monitor would do so again."""
        assert self.governor is not None
        interval_s = self.governor.monitor.tick()
        if self.governor.monitor.last_error is not None:
            raise self.governor.monitor.last_error
        return interval_s

    def read(self) -> Reading:
        """What is to be sensed; the kernel's averages are not, as the law does not look at them."""
        world, now_s = self._world, self._world.clock.now_s
        board, stall_s = world.memories.board, world.stall_s.item(self.board)
        elapsed_s, stalled_s = now_s - self._looked_s, stall_s - self._stall_s
        self._looked_s, self._stall_s = now_s, stall_s
        self.pressure = min(1.0, stalled_s / elapsed_s) if elapsed_s > 0 else 0.0
        available = int(world.memories.available_bytes.item(self.board))
        room = Headroom(
            available_bytes=available,
            slope_bytes_s=self._slope.update(now_s, available),
            limit_bytes=board.memory_bytes,
            usage_bytes=board.memory_bytes - available,
            reclaimable_bytes=0,
            scope=board.scope,
        )
        memory = Stall(StallLine(self.pressure, total_us=int(stall_s * 1e6)), None, board.scope)
        swap = board.swap.size_bytes if board.swap else 0
        swapped = Swap(swap, int(world.memories.swapped_bytes.item(self.board)))
        return Reading(now_s, elapsed_s, room, memory, _CALM, _CALM, swapped, headrooms=(room,))

    def close(self) -> None:
        """Nothing is open."""

    def describe(self) -> list[str]:
        """What it is."""
        return [f"Board {self.board} of a simulated fleet."]
