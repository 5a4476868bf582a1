"""A llama.cpp context whose KV cache gives memory back: every change to the cache goes through here.

Call these methods instead of the `llama_cpp` functions of the same name, from one thread (the engine's). Other
threads may call what a governor needs (`kvpsi.governor.Governed`), which waits for nobody.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import llama_cpp
import numpy as np

from kvpsi.errors import CacheRefusedError, UsageError
from kvpsi.governor.law import CacheStatus
from kvpsi.instrument import Instrument
from kvpsi.kv import pages
from kvpsi.kv.cells import UNKNOWN_TOKEN, IntArray, Placement, StreamCells
from kvpsi.kv.layout import discover
from kvpsi.kv.policies import EvictionPolicy, Streaming
from kvpsi.kv.policies.base import view_of
from kvpsi.kv.statedata import SectionState, parse_state
from kvpsi.kv.tracker import NOTHING, Micro, Release, SectionTracker
from kvpsi.kv.ubatch import Tokens, read_batch, split_equal, split_simple

log = logging.getLogger("kvpsi")

P = ParamSpec("P")
R = TypeVar("R")


def _exclusive(
    operation: Callable[Concatenate[ElasticCache, P], R],
) -> Callable[Concatenate[ElasticCache, P], R]:
    """Keep a governor's thread out while the operation runs."""

    @functools.wraps(operation)
    def locked(self: ElasticCache, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._busy:
            return operation(self, *args, **kwargs)

    return locked


Plans = list[list[list[Placement]] | None]
"""For each cache: for each micro-batch, where its groups go; None where no room is foreseen."""

DECODE_OK, DECODE_NO_ROOM, DECODE_ABORTED, DECODE_INVALID = 0, 1, 2, -1


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What eviction must leave alone, and how large its steps are.

    Attributes:
        keep: first tokens of each sequence that always stay (attention sinks), in tokens.
        tail: last tokens of each sequence that always stay, in tokens.
        min_prune: least tokens that one eviction takes, so that whole pages become free.
    """

    keep: int = 16
    tail: int = 256
    min_prune: int = 64

    def __post_init__(self) -> None:
        for name in ("keep", "tail", "min_prune"):
            value = getattr(self, name)
            if value < 0:
                raise UsageError(f"{name} is {value}, but a number of tokens cannot be negative; use 0 or more.")
        if self.min_prune == 0:
            raise UsageError("min_prune is 0, but an eviction has to take at least one token; use 1 or more.")


@dataclass(frozen=True, slots=True)
class Trim:
    """What an eviction did: cells asked for, cells that became free, and the memory that went back."""

    requested_cells: int
    freed_cells: int
    release: Release


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Positions [first_pos, end_pos) that sequence ``seq_id`` lost to an eviction."""

    seq_id: int
    first_pos: int
    end_pos: int


class ElasticCache:
    """Elastic memory for one llama.cpp context.

    The context must be empty. ``limit_cells`` is the allocation gate: before new cells are taken the policy evicts
    until they fit below it, and if it cannot, `CacheRefusedError` is raised and nothing has changed.

    Raises:
        LayoutError: the context's cache is of a kind that is left alone (see `kvpsi.kv.layout.discover`).
    """

    def __init__(
        self,
        ctx: llama_cpp.llama_context_p,
        *,
        settings: CacheSettings | None = None,
        policy: EvictionPolicy | None = None,
        instrument: Instrument | None = None,
        on_forgotten: Callable[[Forgotten], None] | None = None,
    ) -> None:
        self.ctx = ctx
        self.settings = settings or CacheSettings()
        self.policy = policy or Streaming()
        self.instrument = instrument or Instrument()
        self.on_forgotten = on_forgotten
        self._memory = llama_cpp.llama_get_memory(ctx)
        self._n_seq = int(llama_cpp.llama_n_seq_max(ctx))
        self._n_ubatch = int(llama_cpp.llama_n_ubatch(ctx))
        sections = discover(ctx)
        self.trackers = [SectionTracker(s, self._n_seq) for s in sections]
        self.distrust_reason: str | None = None
        self.max_chunk_tokens: int | None = None
        self._rewritten = False  # a key shift or stream copy waits for the next decode, which writes everywhere
        self._copying = False
        self._abort = ctypes.create_string_buffer(2)
        self._abort_lock = threading.Lock()
        self._busy = threading.RLock()
        self._interruptible = False
        self.releases = 0
        self.trims = 0
        self.interrupts = 0
        self.returned_bytes = 0
        self.limit_cells = self.cap_cells = self.n_cells
        self._install_abort()
        self.release_slack()

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def n_cells(self) -> int:
        """Cells of the (non-sliding) cache over all streams."""
        section = self.trackers[0].section
        return section.n_cells * section.n_stream

    @property
    def used_cells(self) -> int:
        """Cells that hold a token."""
        return self.trackers[0].mirror.used

    @property
    def bytes_per_cell(self) -> int:
        """Bytes that one more cell costs, K and V of all layers."""
        return self.trackers[0].section.bytes_per_cell

    @property
    def capacity_bytes(self) -> int:
        """Size of the whole cache, which stock llama.cpp keeps committed."""
        return sum(t.section.n_bytes for t in self.trackers)

    @property
    def used_bytes(self) -> int:
        """Bytes of the cells that hold a token, sliding windows included."""
        return sum(t.mirror.used * t.section.bytes_per_cell for t in self.trackers)

    @property
    def floor_cells(self) -> int:
        """Below this the cache cannot shrink: the protected tokens of one sequence and room for one eviction."""
        wanted = self.settings.keep + self._tail + self.settings.min_prune + self.block_cells
        return min(wanted, self.n_cells)

    @property
    def block_cells(self) -> int:
        """Evictions take whole blocks of this many cells, so that whole pages become free."""
        return self.trackers[0].section.block_cells

    @property
    def trusted(self) -> bool:
        """Whether every prediction was right so far; if not, nothing is released until the cache is cleared."""
        return self.distrust_reason is None

    @property
    def _tail(self) -> int:
        return max(self.settings.tail, max(t.section.n_swa for t in self.trackers))

    def first_gap(self, seq_id: int) -> int:
        """First position that a sequence has lost (or not reached yet): what is before it is complete."""
        stream = self.trackers[0].mirror.stream_of(seq_id)
        held = np.sort(stream.pos[stream.owner[:, seq_id]])
        missing = np.flatnonzero(held != np.arange(held.size))
        return int(missing[0]) if missing.size else int(held.size)

    def resident_bytes(self) -> int:
        """Bytes of the cache that are in memory, as the kernel counts them (smaps)."""
        return pages.resident_bytes([t.inner for t in self.trackers])[0]

    # -- what a governor needs, from any thread -------------------------------------------------------------------

    def status(self) -> CacheStatus:
        """Capacity, bytes in use and floor, for the control law."""
        return CacheStatus(self.capacity_bytes, self.used_bytes, self.floor_cells * self.bytes_per_cell)

    def set_limit(self, limit_bytes: int, chunk_tokens: int | None) -> None:
        """Set the allocation gate, and how long a piece of prefill may be."""
        self.limit_cells = min(self.n_cells, limit_bytes // self.bytes_per_cell)
        self.max_chunk_tokens = chunk_tokens

    def give_now(self) -> int | None:
        """Shrink to the limit if the engine is idle; the bytes given, None if it is busy."""
        if not self._busy.acquire(blocking=False):
            return None
        try:
            excess = self.used_cells - self.allowed_cells
            return self.evict(excess).release.returned_bytes if excess > 0 else 0
        finally:
            self._busy.release()

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """Keep a governor's thread out for a while, as all operations of this object do."""
        with self._busy:
            yield

    @property
    def allowed_cells(self) -> int:
        """How many cells may hold a token now: the tighter of gate and user's limit, never below the floor."""
        return max(min(self.limit_cells, self.cap_cells), self.floor_cells)

    # -- decoding ------------------------------------------------------------------------------------------------

    @_exclusive
    def decode(self, batch: llama_cpp.llama_batch, *, divisible: bool = False) -> int:
        """`llama_decode`, through the allocation gate.

        Args:
            divisible: the caller reads only the logits of the last token, by index -1. Then the batch may be cut into
                pieces, and be interrupted to make room and go on.

        Returns:
            llama_decode's code.

        Raises:
            CacheRefusedError: no room below ``limit_cells`` and nothing left to evict.
        """
        tokens = read_batch(batch, self._next_pos(batch))
        divisible = divisible and len(tokens) > 1 and tokens.n_outputs <= 1 and not batch.embd
        start = 0
        while start < len(tokens):
            size = len(tokens) - start
            if divisible:
                size = min(size, self.max_chunk_tokens or size, self._n_ubatch)
            whole = size == len(tokens)
            piece = tokens if whole else _piece(tokens, start, size)
            self._make_room(size)
            code = self._decode_piece(batch if whole else _slice(batch, start, size), piece, divisible)
            if code == DECODE_ABORTED and divisible:
                self.interrupts += 1
                self.instrument.event("interrupt", {"tokens": size})
                continue
            if code != DECODE_OK:
                return code
            start += size
        return DECODE_OK

    def _next_pos(self, batch: llama_cpp.llama_batch) -> int:
        return 0 if batch.pos else self.trackers[0].mirror.stream_of(0).pos_max(0) + 1

    def _decode_piece(self, batch: llama_cpp.llama_batch, tokens: Tokens, divisible: bool) -> int:
        micro = self._split(tokens)
        plans = [t.plan(tokens, micro) for t in self.trackers] if self.trusted else []
        if len(self.trackers) > 1 and any(p is None for p in plans):
            # a sliding-window model tries a second way of splitting before it gives up
            micro = split_equal(tokens, self._n_ubatch, streams=False)
            plans = [t.plan(tokens, micro) for t in self.trackers]
        before = [t.key_rows(p) if p else [] for t, p in zip(self.trackers, plans, strict=False)]
        with self._interruptibly(divisible and len(micro) == 1):
            code = int(llama_cpp.llama_decode(self.ctx, batch))
        if self.trusted:
            self._record(code, tokens, micro, plans, before)
        if self._rewritten and code != DECODE_INVALID:
            self._rewritten = self._copying = False
            for tracker in self.trackers:
                tracker.touch_all()
            self.release_slack()
        return code

    def _record(self, code: int, tokens: Tokens, micro: Micro, plans: Plans, before: list[list[bytes]]) -> None:
        """Bring the mirrors up to date with what the decode did."""
        if code == DECODE_OK:
            self._commit(tokens, plans, before)
        elif code == DECODE_ABORTED and len(micro) == 1:
            self._undo(tokens, plans)
        elif code == DECODE_NO_ROOM and any(p is None for p in plans) and len(self.trackers) == 1:
            pass  # foreseen; nothing changed
        elif code != DECODE_INVALID:
            self._distrust(f"llama_decode returned {code}, after which the cells in use are not known")

    def _split(self, tokens: Tokens) -> Micro:
        if self.trackers[0].mirror.n_stream > 1:
            return split_equal(tokens, self._n_ubatch, streams=True)
        return split_simple(tokens, self._n_ubatch)

    def _commit(self, tokens: Tokens, plans: Plans, before: list[list[bytes]]) -> None:
        foreseen = [p for p in plans if p is not None]
        if len(foreseen) < len(plans):
            self._distrust("llama.cpp found room where none was foreseen")
            return
        for tracker, plan, rows in zip(self.trackers, foreseen, before, strict=True):
            if not tracker.all_written(tokens, plan, rows):
                self._distrust("a token did not go to the cell that was predicted for it")
                return
        for tracker, plan in zip(self.trackers, foreseen, strict=True):
            for placements in plan:
                tracker.commit(tokens, placements)

    def _undo(self, tokens: Tokens, plans: Plans) -> None:
        """After an abort llama.cpp removes the micro-batch's positions, from its first one on, from its sequences."""
        for tracker, plan in zip(self.trackers, plans, strict=True):
            if plan is None:
                self._distrust("llama.cpp found room where none was foreseen")
                return
            tracker.commit(tokens, plan[0])
            first: dict[int, int] = {}
            for seqs, pos in zip(tokens.seqs, tokens.pos, strict=True):
                first[seqs[0]] = min(first.get(seqs[0], int(pos)), int(pos))
            for seq_id in sorted(first):
                tracker.mirror.stream_of(seq_id).seq_rm(seq_id, first[seq_id], -1)

    # -- interrupting --------------------------------------------------------------------------------------------

    def _install_abort(self) -> None:
        # libc's strlen of a two-byte buffer: 0 while its first byte is 0. A C function costs nothing per graph
        # node, a Python one would cost as much as the node itself.
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, llama_cpp.ggml_abort_callback)
        self._abort_callback = strlen
        llama_cpp.llama_set_abort_callback(self.ctx, strlen, ctypes.cast(self._abort, ctypes.c_void_p))

    def interrupt(self) -> bool:
        """Stop a running prefill within milliseconds so that room is made first; callable from any thread.

        Returns whether there was something to stop. Single tokens and batches with several outputs are let finish.
        """
        with self._abort_lock:
            if self._interruptible:
                self._abort[0] = b"\1"
            return self._interruptible

    @contextlib.contextmanager
    def _interruptibly(self, allowed: bool) -> Iterator[None]:
        with self._abort_lock:
            self._interruptible = allowed
        try:
            yield
        finally:
            with self._abort_lock:
                self._interruptible = False
                self._abort[0] = b"\0"

    # -- the same operations as llama.cpp's ----------------------------------------------------------------------

    @_exclusive
    def clear(self) -> None:
        """`llama_memory_clear` with the data: all pages go back instead of being overwritten with zeros."""
        llama_cpp.llama_memory_clear(self._memory, False)
        for tracker in self.trackers:
            if self.distrust_reason is not None:
                tracker.touch_all()
            tracker.mirror.clear()
        self.distrust_reason = None
        self._rewritten = self._copying = False
        self.release_slack()

    @_exclusive
    def seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """`llama_memory_seq_rm`."""
        done = bool(llama_cpp.llama_memory_seq_rm(self._memory, seq_id, p0, p1))
        if done:
            self._each_stream(seq_id, lambda s: s.seq_rm(seq_id, p0, p1))
            self._release_if_worthwhile()
        return done

    @_exclusive
    def seq_keep(self, seq_id: int) -> None:
        """`llama_memory_seq_keep`."""
        llama_cpp.llama_memory_seq_keep(self._memory, seq_id)
        self._each_stream(seq_id, lambda s: s.seq_keep(seq_id))
        self._release_if_worthwhile()

    @_exclusive
    def seq_cp(self, src: int, dst: int, p0: int, p1: int) -> None:
        """`llama_memory_seq_cp`; between streams llama.cpp copies the bytes at the next decode."""
        llama_cpp.llama_memory_seq_cp(self._memory, src, dst, p0, p1)
        for tracker in self.trackers:
            source, target = tracker.mirror.stream_of(src), tracker.mirror.stream_of(dst)
            if source is target:
                source.seq_share(src, dst, p0, p1)
            else:
                target.copy_from(source, src, dst)
                self._rewritten = self._copying = True

    @_exclusive
    def seq_add(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        """`llama_memory_seq_add`; llama.cpp rotates all keys at the next decode."""
        llama_cpp.llama_memory_seq_add(self._memory, seq_id, p0, p1, shift)
        self._each_stream(seq_id, lambda s: s.seq_add(seq_id, p0, p1, shift))
        self._rewritten = True

    @_exclusive
    def seq_div(self, seq_id: int, p0: int, p1: int, divisor: int) -> None:
        """`llama_memory_seq_div`; llama.cpp rotates all keys at the next decode."""
        llama_cpp.llama_memory_seq_div(self._memory, seq_id, p0, p1, divisor)
        self._each_stream(seq_id, lambda s: s.seq_div(seq_id, p0, p1, divisor))
        self._rewritten = True

    @_exclusive
    def load_sequence(self, state: bytes, seq_id: int) -> bool:
        """`llama_state_seq_set_data` of a sequence's saved state, through the gate. False if llama.cpp refused it.

        Raises:
            CacheRefusedError: the state's cells do not fit below ``limit_cells``.
            LayoutError: the bytes are not a sequence's state.
        """
        sections = parse_state(state)
        self.seq_rm(seq_id, -1, -1)
        self._make_room(len(sections[0].positions))
        loads = [_saved_tokens(section, seq_id) for section in sections]
        plans = [t.plan(tokens, [[np.arange(len(tokens))]]) for t, tokens in zip(self.trackers, loads, strict=True)]
        source = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if not llama_cpp.llama_state_seq_set_data(self.ctx, source, len(state), seq_id):
            self._distrust("a saved state was refused, after which the cells in use are not known")
            return False
        for tracker, tokens, plan in zip(self.trackers, loads, plans, strict=True):
            if plan is None:
                self._distrust("llama.cpp found room where none was foreseen")
            elif len(tokens):
                tracker.commit(tokens, plan[0])
        return True

    def _each_stream(self, seq_id: int, change: Callable[[StreamCells], object]) -> None:
        for tracker in self.trackers:
            streams = tracker.mirror.streams if seq_id < 0 else [tracker.mirror.stream_of(seq_id)]
            for stream in streams:
                change(stream)

    # -- giving back ---------------------------------------------------------------------------------------------

    def _release_if_worthwhile(self) -> None:
        if any(t.slack_cells() >= t.section.block_cells for t in self.trackers):
            self.release_slack()

    @_exclusive
    def release_slack(self) -> Release:
        """Give back the pages of all free cells. Does nothing while the cells are not known for certain."""
        if self._copying or not self.trusted or not self._agrees():
            return NOTHING
        done = NOTHING
        try:
            for tracker in self.trackers:
                done += tracker.release_slack()
        except OSError as error:
            self._distrust(f"the kernel would not take pages back ({error}); is the process's memory locked?")
            return done
        if done.requested_bytes:
            self.releases += 1
            self.returned_bytes += done.returned_bytes
            self.instrument.event("release", done)
        return done

    def _agrees(self) -> bool:
        """Whether llama.cpp's first and last position of each sequence are those of the mirror.

        Catches changes made behind this object's back before they could cost data.
        """
        mirror = self.trackers[-1].mirror
        present = np.logical_or.reduce([s.owner.any(axis=0) for s in mirror.streams])
        for seq_id in range(self._n_seq):
            stream = mirror.stream_of(seq_id)
            mine = (stream.pos_min(seq_id), stream.pos_max(seq_id)) if present[seq_id] else (-1, -1)
            first = int(llama_cpp.llama_memory_seq_pos_min(self._memory, seq_id))
            last = int(llama_cpp.llama_memory_seq_pos_max(self._memory, seq_id))
            if (first, last) != mine:
                self._distrust(f"sequence {seq_id} was changed without going through kvpsi")
                return False
        return True

    def _distrust(self, reason: str) -> None:
        if self.distrust_reason is None:
            self.distrust_reason = reason
            log.warning("kvpsi stops giving memory back until the cache is cleared: %s.", reason)
            self.instrument.event("distrust", reason)

    # -- the gate and eviction -----------------------------------------------------------------------------------

    def _make_room(self, n_tokens: int) -> None:
        missing = self.used_cells + n_tokens - self.allowed_cells
        if missing <= 0 or self.allowed_cells == self.n_cells or not self.trusted:
            return  # a cache that is full of its own accord is llama.cpp's to refuse
        trim = self.evict(max(missing, self.settings.min_prune))
        if trim.freed_cells < missing:
            self.instrument.event("refusal", {"wanted_cells": n_tokens, "limit_cells": self.limit_cells})
            raise CacheRefusedError(
                f"{n_tokens} more tokens need {missing - trim.freed_cells} cells more than the limit of "
                f"{self.limit_cells} leaves after evicting what may go; raise the limit, or lower keep and tail."
            )

    @_exclusive
    def evict(self, n_cells: int) -> Trim:
        """Let the policy choose at least ``n_cells`` cells (in whole blocks, fewer if not so many may go), forget
        them and give their pages back."""
        freed = 0
        for stream, cells in enumerate(self.trackers[0].mirror.streams):
            if freed >= n_cells or not self.trusted:
                break
            view = view_of(cells, keep=self.settings.keep, tail=self._tail, block_cells=self.block_cells)
            chosen = self.policy.choose(view, n_cells - freed)
            if chosen.size:
                used = self.used_cells
                self._forget(stream, chosen)
                freed += used - self.used_cells
        trim = Trim(n_cells, freed, self.release_slack() if freed else NOTHING)
        if freed:
            self.trims += 1
            self.instrument.event("trim", trim)
        return trim

    def _forget(self, stream: int, chosen: IntArray) -> None:
        cells = self.trackers[0].mirror.streams[stream]
        owner, pos = cells.owner[chosen], cells.pos[chosen]
        for seq_id in np.flatnonzero(owner.any(axis=0)):
            mine = np.sort(pos[owner[:, seq_id]])
            held = np.sort(cells.pos[cells.cells_of(int(seq_id))])
            for first, last in _ranges(mine, held):
                llama_cpp.llama_memory_seq_rm(self._memory, int(seq_id), first, last + 1)
                s, a, b = int(seq_id), first, last + 1
                for tracker in self.trackers:
                    tracker.mirror.stream_of(s).seq_rm(s, a, b)
                if self.on_forgotten:
                    self.on_forgotten(Forgotten(s, a, b))

    @_exclusive
    def close(self) -> None:
        """Take the abort callback away; the context stays as it is and may be used without kvpsi."""
        self._abort[0] = b"\0"
        llama_cpp.llama_set_abort_callback(self.ctx, llama_cpp.ggml_abort_callback(0), None)


def _ranges(chosen: IntArray, held: IntArray) -> list[tuple[int, int]]:
    """First and last position of runs of ``chosen`` that are neighbours among the positions ``held``."""
    at = np.searchsorted(held, chosen)
    breaks = np.flatnonzero(np.diff(at) != 1)
    starts = np.concatenate([[0], breaks + 1])
    ends = np.concatenate([breaks, [len(chosen) - 1]])
    return [(int(chosen[a]), int(chosen[b])) for a, b in zip(starts, ends, strict=True)]


def _piece(tokens: Tokens, start: int, size: int) -> Tokens:
    end = start + size
    outputs = tokens.n_outputs if end == len(tokens) else 0
    return Tokens(tokens.token[start:end], tokens.pos[start:end], tokens.seqs[start:end], outputs)


def _slice(batch: llama_cpp.llama_batch, start: int, size: int) -> llama_cpp.llama_batch:
    """The same arrays, seen from token ``start`` on; the original batch must stay alive meanwhile."""
    part = llama_cpp.llama_batch()
    part.n_tokens = size
    for name in ("token", "pos", "n_seq_id", "seq_id", "logits"):
        pointer = getattr(batch, name)
        if pointer:
            item = ctypes.sizeof(pointer._type_)
            address = ctypes.cast(pointer, ctypes.c_void_p).value or 0
            setattr(part, name, ctypes.cast(address + start * item, type(pointer)))
    return part


def _saved_tokens(section: SectionState, seq_id: int) -> Tokens:
    """The cells of a saved sequence as a batch; which tokens they were is not saved."""
    n = len(section.positions)
    pos = np.array(section.positions, dtype=np.int32)
    return Tokens(np.full(n, UNKNOWN_TOKEN, dtype=np.int32), pos, [(seq_id,)] * n, 0)
