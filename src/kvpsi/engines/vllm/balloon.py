"""Which of vLLM's KV blocks may be used, which hold memory, and which go back: what a governor governs.

A block is in one of these states:

- *in use* by a request;
- *cached*: free, with keys and values that another request may ask for again;
- *idle*: free, nothing of use in it, but it was written to and holds memory;
- *empty*: free, without memory. It costs nothing, so it stays in vLLM's pool;
- *out*: taken out of the pool, without memory, so that vLLM cannot use it;
- *leaving*: taken out, and its memory is given back next;
- *releasing*: its memory is given back just now.

The limit bounds the blocks in the pool, as vLLM may write to any of them. Nothing is forgotten by any of this: vLLM
computes again what it asks for.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvpsi.engines.vllm.layout import Run, runs_of
from kvpsi.engines.vllm.log import log
from kvpsi.engines.vllm.pool import Block, FreeQueue, Pool
from kvpsi.errors import EnvironmentProblem
from kvpsi.instrument import Instrument, guarded
from kvpsi.status import CacheStatus

_LOOK_S = 1.0
_STOP_S = 5.0
_BATCH_BYTES = 1 << 30
_PIECE_BYTES = 32 << 20  # to find memory for it takes less than a tenth of a second


@dataclass(frozen=True, slots=True)
class BalloonSettings:
    """Sizes and times.

    Attributes:
        block_bytes: of one block, over all layers and workers.
        floor_blocks: fewer are never in the pool: with less than the longest request needs vLLM would preempt it and
            begin again for ever.
        most_blocks: more are never; None: all.
        idle_s: an idle block holds its memory for so long after it was first seen, as it may soon be used again.
        silence_s: if the governor is not heard of for so long, ``most_blocks`` are put back.
    """

    block_bytes: int
    floor_blocks: int
    most_blocks: int | None = None
    idle_s: float = 2.0
    silence_s: float = 10.0


@dataclass(frozen=True, slots=True)
class BlockRelease:
    """Blocks whose memory went back: ``returned_bytes`` were in memory before (mincore) and are not any more."""

    blocks: int
    returned_bytes: int
    seconds: float


class Balloon:
    """Keeps the blocks of one pool within a limit.

    ``lock`` guards the pool: whoever uses it, vLLM's scheduler first of all, holds it meanwhile. It is never held while
    memory is given back, nor while the model computes.

    Args:
        pool: vLLM's.
        settings: sizes and times.
        release: gives back the memory of runs of blocks and returns when it is done; EnvironmentProblem if it is not,
            and nothing is being done about it any more.
        provide: finds memory for runs of blocks that are about to be written to, if there is some, and returns when it
            is done; EnvironmentProblem as for ``release``.
        instrument: sees what was given, as ``release``.
        clock: seconds.
    """

    def __init__(
        self,
        pool: Pool,
        settings: BalloonSettings,
        release: Callable[[list[Run]], int],
        *,
        provide: Callable[[list[Run]], None] = lambda _: None,
        instrument: Instrument | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.lock = threading.RLock()
        self.settings = settings
        self.instrument = guarded(instrument)
        self.n_blocks = pool.num_gpu_blocks - 1
        self.failure: str | None = None
        self.returned_bytes = 0
        self.releases = 0
        self._pool, self._release, self._provide, self._clock = pool, release, provide, clock
        self._floor = self._least = min(settings.floor_blocks, self.n_blocks)
        most = self.n_blocks if settings.most_blocks is None else min(settings.most_blocks, self.n_blocks)
        self._most = max(most, self._floor)
        self._allowed = self._most
        self._resident = set(range(1, pool.num_gpu_blocks))  # vLLM writes zeros over everything when it starts
        self._idle_since_s = dict.fromkeys(self._resident, -math.inf)
        self._fresh: set[int] = set()
        self._is_short = False
        self._out: dict[int, Block] = {}
        self._leaving: dict[int, Block] = {}
        self._releasing: dict[int, Block] = {}
        self._settling = threading.Lock()
        self._heard_s: float | None = None
        self._is_lifted = False
        self._wake, self._ended = threading.Event(), threading.Event()
        self._has_to_settle = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvpsi-balloon", daemon=True)

    # What a governor asks for

    def status(self) -> CacheStatus:
        """Sizes as of now: used is what holds memory. All of it can be had again."""
        size, used = self.settings.block_bytes, len(self._resident)
        floor = self.n_blocks if self.failure else self._floor
        return CacheStatus(
            capacity_bytes=self.n_blocks * size,
            used_bytes=used * size,
            floor_bytes=floor * size,
            returned_bytes=self.returned_bytes,
            lossless_bytes=used * size,
        )

    def set_limit(self, limit_bytes: int, chunk_tokens: int | None) -> None:
        """Bound the blocks in the pool. What is empty follows at once, what holds memory when it was given back.

        Prompts are read in pieces of vLLM's own size, so ``chunk_tokens`` says only that memory is short.
        """
        with self.lock:
            self._heard_s, self._is_lifted = self._clock(), False
            self._is_short = chunk_tokens is not None
            if self.failure is None:
                self._allow(limit_bytes // self.settings.block_bytes)
                if self.pool_blocks > self._allowed:
                    self._settle_soon()

    def give_now(self) -> int | None:
        """Shrink to the limit; None if requests use more, of which some are preempted at the next step."""
        returned_bytes = self.settle()
        return None if self.beyond_limit else returned_bytes

    def interrupt(self) -> bool:
        """False: a running step of vLLM goes to its end."""
        return False

    # What the scheduler asks for

    @property
    def allowed_blocks(self) -> int:
        """Blocks that may be in the pool."""
        return self._allowed

    @property
    def in_use_blocks(self) -> int:
        """Blocks of requests."""
        with self.lock:
            return self.pool_blocks - self._pool.get_num_free_blocks()

    @property
    def pool_blocks(self) -> int:
        """Blocks that are in the pool, used or free."""
        with self.lock:
            return self.n_blocks - len(self._out) - len(self._leaving) - len(self._releasing)

    @property
    def beyond_limit(self) -> bool:
        """Whether requests alone use more than the limit."""
        return self.in_use_blocks > self._allowed

    @property
    def usage(self) -> float:
        """Share of the whole cache (0 to 1) that requests use."""
        return self.in_use_blocks / max(1, self.n_blocks)

    @property
    def is_heard(self) -> bool:
        """Whether the governor is alive: what it sensed last counts."""
        heard_s = self._heard_s
        return heard_s is not None and self._clock() - heard_s < self.settings.silence_s

    @property
    def problem(self) -> str | None:
        """Why nothing is given back any more; None: it is, when it has to be."""
        return self.failure or ("the governor is silent" if self._is_lifted else None)

    def keep(self, n_blocks: int) -> None:
        """Never let the limit fall below so many blocks and one request besides: they are held by those who neither
        run nor can be preempted."""
        with self.lock:
            floor = min(self._least + n_blocks, self.n_blocks)
            if floor != self._floor:
                self._floor = floor
                self._allow(self._allowed)

    def written(self, block_ids: Iterable[int]) -> None:
        """These are about to be written to; call it with the lock held."""
        for block_id in block_ids:
            if block_id:
                if block_id not in self._resident:
                    self._resident.add(block_id)
                    self._fresh.add(block_id)
                    self._wake.set()
                self._idle_since_s.pop(block_id, None)

    def shrink(self) -> None:
        """Take what is free beyond the limit out at once, and have its memory given back soon, in the balloon's own
        thread; call it with the lock held."""
        if self.failure is None:
            self._take()
            self._settle_soon()
        else:
            self._allow(self._allowed)

    def lift_if_silent(self) -> None:
        """Put the blocks back if the governor has died; call it now and then."""
        if self._heard_s is None or self.is_heard:
            return
        with self.lock:
            self._heard_s, self._is_short, self._is_lifted = None, False, True
            log.warning("kvpsi: the governor is silent, so vLLM has its blocks again")
            self._allow(self._most)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """All blocks are back in the pool meanwhile, and the lock is held."""
        with self._settling, self.lock:
            self._stay()
            self._put_back(len(self._out))
            try:
                yield
            finally:
                self._allow(self._allowed)
                self._settle_soon()

    # Its own work

    def start(self) -> None:
        """Give back what is empty from the start, then look after idle blocks in a thread."""
        self._settle_all()
        self._thread.start()

    def stop(self) -> None:
        """End the thread and put all blocks back; may be called twice."""
        self._ended.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_S)  # a worker that does not answer holds it up
        with self.lock:
            self._stay()
            self._allow(self._most)

    def settle(self) -> int:
        """Take out what is beyond the limit, and give back what holds memory for nothing; the bytes that went back."""
        with self._settling:
            with self.lock:
                if self.failure is not None:
                    return 0
                self._take()
                self._releasing.update(self._leaving)
                # neighbours that are out go along, so that the page on their border goes, too
                for neighbour in {i + d for i in self._leaving for d in (-1, 1)} & self._out.keys():
                    self._releasing[neighbour] = self._out.pop(neighbour)
                self._leaving.clear()
                ids = sorted(self._releasing)
            if not ids:
                return 0
            began_s = self._clock()
            try:
                returned_bytes = self._release(runs_of(ids))
            except EnvironmentProblem as problem:
                self._give_up(str(problem))
                return 0
            with self.lock:
                n_emptied = len(self._resident.intersection(ids))
                self._resident.difference_update(ids)
                self._out.update(self._releasing)
                self._releasing.clear()
                self.returned_bytes += returned_bytes
                self.releases += 1
                self._allow(self._allowed)
        release = BlockRelease(n_emptied, returned_bytes, self._clock() - began_s)
        self.instrument.event("release", release)
        return returned_bytes

    def _allow(self, n_blocks: int) -> None:
        self._allowed = max(self._floor, min(self._most, n_blocks))
        surplus = self.pool_blocks - self._allowed
        if surplus > 0:
            # once nothing is given back any more, those that hold memory keep it
            out = [block for block in self._free() if self.failure or block.block_id not in self._resident][:surplus]
            self._withdraw(out)
            self._out.update((block.block_id, block) for block in out)
        else:
            self._put_back(min(-surplus, len(self._out)))

    def _free(self) -> Sequence[Block]:
        queue: FreeQueue = self._pool.free_block_queue
        return queue.get_all_free_blocks()

    def _withdraw(self, free: Sequence[Block]) -> None:
        """Take free blocks out of the pool, so that they cannot be found by what is cached in them.

        An empty one may be cached, too, if a request was preempted before it wrote to it.
        """
        self._pool.touch(free)
        self._pool.evict_blocks({block.block_id for block in free})

    def _put_back(self, n_blocks: int) -> None:
        self._pool.free_blocks([self._out.popitem()[1] for _ in range(n_blocks)])

    def _take(self) -> None:
        """Take out idle blocks whose time is over; beyond the limit also younger ones, and then cached ones, the least
        recently used first. Empty ones come in their place, as far as there are any."""
        self._allow(self._allowed)
        now_s, free = self._clock(), self._free()
        holding = [block for block in free if block.block_id in self._resident]
        idle = [block for block in holding if block.block_hash is None]
        due = [b for b in idle if now_s - self._idle_since_s.setdefault(b.block_id, now_s) >= self.settings.idle_s]
        taken = {block.block_id: block for block in due[: self._most_due(len(free))]}
        surplus = self.pool_blocks - self._allowed
        for block in (*idle, *(block for block in holding if block.block_hash is not None)):
            if len(taken) >= surplus:
                break
            taken.setdefault(block.block_id, block)
        self._withdraw(list(taken.values()))
        self._leaving.update(taken)
        self._allow(self._allowed)

    def _most_due(self, n_free: int) -> int:
        """How many blocks may be away at once for no other reason than that they are idle: running requests find free
        ones meanwhile, and nobody waits long for what is being given back."""
        most = max(1, _BATCH_BYTES // self.settings.block_bytes)
        if self.in_use_blocks == 0:
            return most
        return min(most, len(self._out) + max(0, min((n_free + 1) // 2, self.pool_blocks - self._floor)))

    def _stay(self) -> None:
        """Put back what was to leave next."""
        self._pool.free_blocks(list(self._leaving.values()))
        self._leaving.clear()

    def _give_up(self, why: str) -> None:
        with self.lock:
            self.failure = why
            self._stay()
            self._out.update(self._releasing)
            self._releasing.clear()
            self._allow(self._most)
        log.warning("kvpsi: memory is not given back any more, and vLLM has its blocks again: %s", why)

    def provide_fresh(self) -> None:
        """Find memory for blocks before the model writes to their pages one by one, which costs it several times as
        much; not while memory is short or something has to go."""
        while True:
            with self._settling:  # nothing is released meanwhile
                with self.lock:
                    ids = self._next_fresh()
                if not ids:
                    return
                try:
                    self._provide(runs_of(ids))
                except EnvironmentProblem as problem:
                    self._give_up(str(problem))
                    return

    def _next_fresh(self) -> list[int]:
        """A few of them, so that nothing waits long that has to go meanwhile."""
        if self._is_short or self._leaving or self.pool_blocks > self._allowed:
            self._fresh.clear()
        self._fresh &= self._resident
        ids = sorted(self._fresh)[: max(1, _PIECE_BYTES // self.settings.block_bytes)]
        self._fresh.difference_update(ids)
        return ids

    def _settle_all(self) -> None:
        while self.settle() and not self._ended.is_set():
            pass

    def _settle_soon(self) -> None:
        self._has_to_settle.set()
        self._wake.set()

    def _run(self) -> None:
        looked_s = -math.inf
        while not self._ended.is_set():
            self._wake.wait(_LOOK_S)
            self._wake.clear()
            if self._ended.is_set() or self.failure:
                return
            try:
                self.provide_fresh()
                if self._has_to_settle.is_set() or time.monotonic() - looked_s >= _LOOK_S:
                    self._has_to_settle.clear()
                    looked_s = time.monotonic()
                    self._settle_all()
            except Exception:
                log.exception("kvpsi: idle blocks could not be given back")
