"""What all governed caches share: the allocation gate, decoding in pieces, interrupting, and who may act when."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Concatenate, Literal, ParamSpec, TypeVar

import llama_cpp

from kvpsi.errors import CacheRefusedError, UsageError
from kvpsi.instrument import Instrument, guarded
from kvpsi.kv.forgetting import Forgetting
from kvpsi.kv.statedata import StateBytes
from kvpsi.kv.tracker import Release
from kvpsi.kv.ubatch import Tokens, read_batch
from kvpsi.ladder import Ladder
from kvpsi.status import CacheStatus

log = logging.getLogger("kvpsi")

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound="GatedCache")

# The abort callback, asked at every node of a graph: libc's strlen of a two-byte buffer, 0 while its first byte is 0.
# A C function costs nothing there, a Python one would cost as much as the node itself.
_STRLEN = ctypes.cast(ctypes.CDLL("msvcrt" if sys.platform == "win32" else None).strlen, llama_cpp.ggml_abort_callback)
_NO_CALLBACK = llama_cpp.ggml_abort_callback(0)

_ANY_THREADS = 1 << 16
DECODE_OK, DECODE_NO_ROOM, DECODE_ABORTED, DECODE_INVALID = 0, 1, 2, -1


def exclusive(operation: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """Keep a governor's thread out while the operation runs."""

    @functools.wraps(operation)
    def locked(self: C, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._busy:
            self._settle()
            return operation(self, *args, **kwargs)

    return locked


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """What eviction must leave alone, and how large its steps are.

    Attributes:
        keep: first tokens of each sequence that always stay (attention sinks), in tokens.
        tail: last tokens of each sequence that always stay, in tokens.
        min_prune: least tokens that one eviction takes, so that whole pages become free.
        turn: most tokens that always stay of a conversation's first turn (the system prompt), from its beginning, and
            as many of the last turn that has ended (what is being answered), from its end.
    """

    keep: int = 16
    tail: int = 256
    min_prune: int = 64
    turn: int = 256

    def __post_init__(self) -> None:
        for name in ("keep", "tail", "turn", "min_prune"):
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
    """Positions [first_pos, end_pos) that sequence ``seq_id`` lost to an eviction.

    ``n_tokens`` were still there: a range may reach over a gap that an earlier eviction left.
    """

    seq_id: int
    first_pos: int
    end_pos: int
    n_tokens: int


class GatedCache(ABC):
    """Base of the caches that a governor can shrink.

    ``mode`` tells how memory is given back. A subclass knows its ``n_cells`` before it calls ``__init__``, and sets
    ``_n_ubatch``, the most tokens that llama.cpp computes at once, and ``_n_swa``, the sliding window or 0.

    Attributes:
        ladder: what gives room, forgetting last.
        makes_room: whether a decode asks the ladder for it; else that is done before, by whoever decodes.
        releases, trims, interrupts: how often pages went back, something was forgotten, a decode was stopped.
        forgotten_cells: all that ever were.
        n_threads: that compute, if that was ever set.
        most_threads: that ever compute, for single tokens and for batches.
        thread_changes: how often that was set.
        returned_bytes: all that ever went back to the system.
    """

    mode: ClassVar[Literal["pages", "rebuild", "fixed"]]
    _n_ubatch: int
    _n_swa: int

    def __init__(
        self,
        settings: CacheSettings | None,
        instrument: Instrument | None,
        on_forgotten: Callable[[Forgotten], None] | None,
    ) -> None:
        self.settings = settings or CacheSettings()
        self.instrument = guarded(instrument)
        self.on_forgotten = on_forgotten
        self.distrust_reason: str | None = None
        self.max_chunk_tokens: int | None = None
        self._abort = ctypes.create_string_buffer(2)
        self._abort_data = ctypes.cast(self._abort, ctypes.c_void_p)
        self._abort_lock = threading.Lock()
        self._busy = threading.RLock()
        self._interruptible = False
        self.ladder = Ladder((Forgetting(weakref.ref(self)),))
        self.makes_room = True
        self.n_threads: int | None = None
        self.most_threads = (_ANY_THREADS, _ANY_THREADS)
        self.thread_changes = 0
        self.releases = 0
        self.trims = 0
        self.forgotten_cells = 0
        self.interrupts = 0
        self.returned_bytes = 0
        self.limit_cells = self.cap_cells = self.n_cells
        self._peak_cells = 0

    @property
    def on_forgotten(self) -> Callable[[Forgotten], None] | None:
        """Called with every range that an eviction took; what it raises is logged and stops nothing."""
        return self._on_forgotten

    @on_forgotten.setter
    def on_forgotten(self, listener: Callable[[Forgotten], None] | None) -> None:
        self._on_forgotten = None if listener is None else _logging_errors(listener)

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def n_cells(self) -> int:
        """Cells that the cache may have at most."""

    @property
    @abstractmethod
    def used_cells(self) -> int:
        """Cells that hold a token."""

    @property
    @abstractmethod
    def committed_cells(self) -> int:
        """Cells whose memory is not available to others."""

    @property
    def peak_cells(self) -> int:
        """The most cells whose memory was ever not available to others, after a decode."""
        return max(self._peak_cells, self.committed_cells)

    def take_over(self, other: GatedCache) -> None:
        """Go on where another cache of the same model ends: its gate, its listener, and what it counted."""
        limit_cells = other.limit_cells if other.limit_cells < other.n_cells else self.n_cells
        self.set_limit(limit_cells * self.bytes_per_cell, other.max_chunk_tokens)
        self.on_forgotten = other._on_forgotten
        self.n_threads, self.most_threads = other.n_threads, other.most_threads
        self.thread_changes += other.thread_changes
        self.releases += other.releases
        self.trims += other.trims
        self.makes_room = other.makes_room
        self.forgotten_cells += other.forgotten_cells
        self.interrupts += other.interrupts
        self.returned_bytes += other.returned_bytes

    def _note_peak(self) -> None:
        self._peak_cells = self.peak_cells

    @property
    def given_bytes(self) -> dict[str, int]:
        """What went back, by what was given up: unused pages (``slack``) and the rungs of the ladder."""
        given = self.ladder.given_bytes
        return {"slack": max(0, self.returned_bytes - sum(given.values())), **given}

    @property
    @abstractmethod
    def bytes_per_cell(self) -> int:
        """Bytes that one more cell costs, K and V of all layers."""

    @property
    @abstractmethod
    def capacity_bytes(self) -> int:
        """Size of the whole cache, which stock llama.cpp keeps committed."""

    @property
    @abstractmethod
    def floor_cells(self) -> int:
        """Below this the cache cannot shrink."""

    @abstractmethod
    def resident_bytes(self) -> int:
        """Bytes of the cache that are in memory."""

    @abstractmethod
    def first_gap(self, seq_id: int) -> int:
        """First position that a sequence has lost (or not reached yet): what is before it is complete."""

    @property
    def forgettable_bytes(self) -> int:
        """How much an eviction could take."""
        return max(0, self.used_cells - self._protected_cells) * self.bytes_per_cell

    def forget(self, n_bytes: int) -> int:
        """Evict so much, and as much as one eviction takes at least; the bytes that became free."""
        n_cells = max(-(-n_bytes // self.bytes_per_cell), self.settings.min_prune)
        return self.evict(n_cells).freed_cells * self.bytes_per_cell

    @property
    def allowed_cells(self) -> int:
        """How many cells may hold a token now: the tighter of gate and user's limit, never below the floor."""
        return max(min(self.limit_cells, self.cap_cells), self.floor_cells)

    @property
    def trusted(self) -> bool:
        """Whether what is known of the cache was right so far; if not, it gives nothing until it is cleared."""
        return self.distrust_reason is None

    # -- what a governor needs, from any thread -------------------------------------------------------------------

    @abstractmethod
    def status(self) -> CacheStatus:
        """Capacity, bytes in use and floor, for the control law."""

    @abstractmethod
    def give_now(self) -> int | None:
        """Shrink to the limit if the engine is idle; the bytes given, None if it is busy."""

    def set_limit(self, limit_bytes: int, chunk_tokens: int | None) -> None:
        """Set the allocation gate, and how long a piece of prefill may be."""
        self.limit_cells = min(self.n_cells, limit_bytes // self.bytes_per_cell)
        self.max_chunk_tokens = chunk_tokens

    def set_threads(self, n_threads: int) -> None:
        """Compute with so many threads from the next decode on; callable from any thread."""
        self.n_threads = n_threads
        self.thread_changes += 1

    def interrupt(self) -> bool:
        """Stop a running decode within milliseconds so that room is made first; callable from any thread.

        Returns whether there was something to stop. Batches with several outputs are let finish.
        """
        with self._abort_lock:
            if self._interruptible:
                self._abort[0] = b"\1"
            return self._interruptible

    # -- who may act when ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """Keep a governor's thread out for a while, as all operations of this object do."""
        with self._busy:
            self._settle()
            yield

    def _settle(self) -> None:  # noqa: B027 - most caches record every token at once
        """Bring up to date what is known of the cells, before anything but another single token uses it."""

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Lasts as long as somebody samples from the context between decodes."""
        yield

    # -- decoding ------------------------------------------------------------------------------------------------

    @exclusive
    def decode(
        self, batch: llama_cpp.llama_batch, *, divisible: bool = False, return_when_stopped: bool = False
    ) -> int:
        """`llama_decode`, through the allocation gate.

        Args:
            divisible: the caller reads only the logits of the last token, by index -1. Then the batch may be cut into
                pieces, and be interrupted to make room and go on.
            return_when_stopped: any batch may be interrupted to make room; then nothing of it was decoded, and
                ``DECODE_ABORTED`` comes back.

        Returns:
            llama_decode's code.

        Raises:
            CacheRefusedError: no room below ``limit_cells`` and nothing left to evict.
        """
        tokens = read_batch(batch, self._next_pos(batch))
        divisible = divisible and len(tokens) > 1 and tokens.n_outputs <= 1 and not batch.embd
        stoppable = not batch.embd and (divisible or len(tokens) == 1 or return_when_stopped)
        start = 0
        stopped = False
        while start < len(tokens):
            changes = self._changes
            self._resize_if_due()
            size = len(tokens) - start
            if divisible:
                size = min(size, self.most_at_once())
            whole = size == len(tokens)
            piece = tokens if whole else _piece(tokens, start, size)
            self._make_room(size)
            try:
                part = batch if whole else _slice(batch, start, size)
                # what was stopped may be stopped again only if something changed meanwhile, or it would never end
                again = self._changes > changes
                code = self._decode_piece(part, piece, stoppable and (again or not stopped))
            except BaseException:
                self._broken_off()
                raise
            stopped = code == DECODE_ABORTED and stoppable
            if stopped:
                self._note_interrupt(size)
                if return_when_stopped:
                    return code
                continue
            if code != DECODE_OK:
                return code
            self._note_peak()
            start += size
        return DECODE_OK

    @property
    def _changes(self) -> int:
        """How often anything changed that a decode may be stopped for."""
        return self.releases + self.trims + self.thread_changes

    @abstractmethod
    def _next_pos(self, batch: llama_cpp.llama_batch) -> int:
        """Where a batch without positions goes on."""

    @abstractmethod
    def _make_room(self, n_tokens: int) -> None:
        """Have room for so many tokens more below the gate, or raise CacheRefusedError."""

    @abstractmethod
    def _decode_piece(self, batch: llama_cpp.llama_batch, tokens: Tokens, stoppable: bool) -> int:
        """Decode and take note of what it did to the cells; llama_decode's code."""

    def _broken_off(self) -> None:  # noqa: B027 - a cache that keeps no record of cells has nothing to check
        """An exception (Ctrl-C) came between llama.cpp's decode and the record of it."""

    def _note_interrupt(self, n_tokens: int) -> None:
        self.interrupts += 1
        self.instrument.event("interrupt", {"tokens": n_tokens})

    def _resize_if_due(self) -> None:  # noqa: B027 - most caches have no size of their own
        """Follow the gate where that takes more than evicting."""

    def most_at_once(self) -> int:
        """Most tokens of a piece: what llama.cpp computes at once, under a limit what evicting can make room for."""
        most = min(self.max_chunk_tokens or self._n_ubatch, self._n_ubatch)
        if self.allowed_cells < self.n_cells:
            most = min(most, self.allowed_cells - min(self.used_cells, self._protected_cells))
        return max(1, most)

    @property
    def _tail(self) -> int:
        """Last tokens of a sequence that stay; at least one, as llama.cpp goes on from the last that it holds."""
        return max(self.settings.tail, self._n_swa, 1)

    @property
    def _protected_cells(self) -> int:
        """Most cells that an eviction leaves alone."""
        return self.settings.keep + self.settings.tail

    def _refuse(self, n_tokens: int, short_cells: int) -> CacheRefusedError:
        allowed, (name, remedy) = self.allowed_cells, self._what_holds()
        self.instrument.event("refusal", {"wanted_cells": n_tokens, "limit_cells": allowed})
        return CacheRefusedError(
            f"{n_tokens} more tokens need {short_cells} cells more than the {name} of {allowed} cells leaves after "
            f"evicting what may go; {remedy}, or lower keep and tail."
        )

    def _what_holds(self) -> tuple[str, str]:
        """What `allowed_cells` comes from, and what can be done about it."""
        if self.floor_cells > min(self.limit_cells, self.cap_cells):
            return "floor", "raise the limit above it"
        if self.cap_cells <= self.limit_cells:
            return "cache limit", "raise it"
        return "limit that memory sets", "free memory"

    # -- computing ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _computing(self, ctx: llama_cpp.llama_context_p, stoppable: bool) -> Iterator[None]:
        """``ctx`` decodes with as many threads as it is to, and `interrupt` may stop it if it is stoppable."""
        if self.n_threads is not None:
            single, batched = (min(self.n_threads, most) for most in self.most_threads)
            if (llama_cpp.llama_n_threads(ctx), llama_cpp.llama_n_threads_batch(ctx)) != (single, batched):
                llama_cpp.llama_set_n_threads(ctx, single, batched)
        if not stoppable:
            yield
            return
        llama_cpp.llama_set_abort_callback(ctx, _STRLEN, self._abort_data)
        with self._abort_lock:
            self._interruptible = True
        try:
            yield
        finally:
            with self._abort_lock:
                self._interruptible = False
                self._abort[0] = b"\0"
            llama_cpp.llama_set_abort_callback(ctx, _NO_CALLBACK, None)

    # -- the same operations as llama.cpp's ----------------------------------------------------------------------

    @abstractmethod
    def clear(self) -> None:
        """`llama_memory_clear`."""

    @abstractmethod
    def seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """`llama_memory_seq_rm`."""

    @abstractmethod
    def seq_keep(self, seq_id: int) -> None:
        """`llama_memory_seq_keep`."""

    @abstractmethod
    def seq_cp(self, src: int, dst: int, p0: int, p1: int) -> None:
        """`llama_memory_seq_cp`."""

    @abstractmethod
    def seq_add(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        """`llama_memory_seq_add`."""

    @abstractmethod
    def load_sequence(self, state: StateBytes, seq_id: int) -> bool:
        """`llama_state_seq_set_data` of a sequence's saved state, through the gate. False if llama.cpp refused it."""

    def note_tokens(self, seq_id: int, tokens: Sequence[int]) -> None:  # noqa: B027 - most need not know
        """Say which tokens a loaded sequence holds, from position 0 on: a saved state does not."""

    @abstractmethod
    def evict(self, n_cells: int) -> Trim:
        """Forget at least ``n_cells`` cells, fewer if not so many may go."""

    @abstractmethod
    def restore_capacity(self) -> None:
        """Give the context the size back that it had before it was governed, as far as that is possible."""

    def close(self) -> None:  # noqa: B027 - not every cache holds on to something
        """Let go of the context, which stays as it is and may be used without kvpsi."""


def _logging_errors(listener: Callable[[Forgotten], None]) -> Callable[[Forgotten], None]:
    """A listener whose exceptions are logged (the first as a warning), so that an eviction is never left halfway."""
    failed = False

    @functools.wraps(listener, updated=())
    def called(forgotten: Forgotten) -> None:
        nonlocal failed
        try:
            listener(forgotten)
        except Exception as error:  # whoever is told must not stop what was done already
            log.log(logging.DEBUG if failed else logging.WARNING, "A listener to what was forgotten failed: %r", error)
            failed = True

    return called


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
