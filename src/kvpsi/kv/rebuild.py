"""A llama.cpp context that gives memory back as a whole: saved, freed, made again with fewer cells, and loaded.

For caches whose pages cannot be given back one by one: in GPU buffers, arranged in an unknown way, or not on Linux.
It costs a copy of the tokens in use and a moment in which nothing is decoded, so steps are large and rare. Not
verified on a CUDA or other GPU build: nothing here depends on where the cells lie, but it was run on a CPU only.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import llama_cpp
import numpy as np

from kvpsi.errors import LayoutError, RebuildError, UsageError
from kvpsi.governor.law import CacheStatus
from kvpsi.instrument import Instrument
from kvpsi.kv import pages
from kvpsi.kv.gated import DECODE_ABORTED, DECODE_OK, CacheSettings, Forgotten, GatedCache, Trim, exclusive
from kvpsi.kv.layout import refuse_unsupported
from kvpsi.kv.positions import Positions
from kvpsi.kv.statedata import parse_state
from kvpsi.kv.tracker import NOTHING
from kvpsi.kv.ubatch import Tokens

log = logging.getLogger("kvpsi")

_ONLY_SEQUENCE = 0
_CELLS_STEP = 256
"""llama.cpp rounds the size of a context up to a multiple of this."""


class ContextHolder(Protocol):
    """Whoever holds a context for others to use, such as `llama_cpp._internals.LlamaContext`.

    ``ctx`` and ``memory`` are replaced in place, both None while there is no context; ``params`` is what it was made
    with, ``model.model`` the model.
    """

    ctx: Any
    memory: Any
    params: Any
    model: Any


@dataclass(frozen=True, slots=True)
class RebuildSettings:
    """How often and in which steps a context may be rebuilt.

    Attributes:
        min_interval_s: least time from one rebuild to the next that shrinks for the governor's sake. What the user
            asks for, and growing for tokens that would otherwise be forgotten, does not wait.
        min_step_share: least share of the capacity by which the size changes. Less only where a whole step would
            make tokens be forgotten that the limit leaves room for, and at either end.
    """

    min_interval_s: float = 2.0
    min_step_share: float = 0.25

    def __post_init__(self) -> None:
        if self.min_interval_s < 0:
            raise UsageError(f"min_interval_s is {self.min_interval_s}, but a time is not negative; use 0 or more.")
        if not 0 < self.min_step_share <= 1:
            raise UsageError(f"min_step_share is {self.min_step_share}; give a share above 0 and at most 1.")


@dataclass(frozen=True, slots=True)
class Rebuild:
    """What a rebuild did.

    ``to_cells`` is ``from_cells`` where no context of ``wanted_cells`` could be made. ``returned_bytes`` is by how
    much the process's resident set fell, as the kernel counts it, 0 when it grew or the cells lie elsewhere.
    """

    from_cells: int
    wanted_cells: int
    to_cells: int
    saved_bytes: int
    returned_bytes: int
    seconds: float


class RebuiltCache(GatedCache):
    """Resizes the context of one sequence (0) by rebuilding it.

    The context must be empty. ``committed_cells`` is the size of the context as it is now, ``n_cells`` the size that
    it had at first and never exceeds. Shrinks when the limit is below the former, at the start of a decode or, between
    requests, on the governor's thread; grows back when tokens come and the limit allows. Forgets the oldest tokens
    between the first ``keep`` and last ``tail``, whatever the policy elsewhere.

    Args:
        equip: attaches to a new context what else the first one had (LoRA adapters); False if that failed.
        on_rebuilt: called after each rebuild, as the logits are gone; with False where the tokens are gone, too.

    Raises:
        LayoutError: the model keeps no plain KV cache, or the context serves several sequences.
    """

    mode = "rebuild"

    def __init__(
        self,
        holder: ContextHolder,
        *,
        settings: CacheSettings | None = None,
        pace: RebuildSettings | None = None,
        instrument: Instrument | None = None,
        on_forgotten: Callable[[Forgotten], None] | None = None,
        equip: Callable[[llama_cpp.llama_context_p], bool] = lambda _: True,
        on_rebuilt: Callable[[bool], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        ctx = holder.ctx
        refuse_unsupported(ctx)
        if int(llama_cpp.llama_n_seq_max(ctx)) > 1:
            raise LayoutError("This context serves several sequences, but rebuilding carries only one over.")
        self.holder = holder
        self.pace = pace or RebuildSettings()
        self._bytes_per_cell = _measure_cell(ctx)
        self._n_cells = self._committed_cells = int(llama_cpp.llama_n_ctx(ctx))
        self._n_ubatch = int(llama_cpp.llama_n_ubatch(ctx))
        self._n_swa = int(llama_cpp.llama_model_n_swa(holder.model.model))
        self._least_cells = _least_cells(holder.model.model, self._n_cells)
        super().__init__(settings, instrument, on_forgotten)
        self._equip, self._on_rebuilt, self._clock = equip, on_rebuilt, clock
        self._held = Positions()
        self._saved: mmap.mmap | None = None
        self._shift_pending = False  # keys are rotated at the next decode; a saved state would miss that
        self._rebuilt_at_s = clock() - self.pace.min_interval_s
        self._grow_from_s = clock()  # not before, after no memory was found
        self._requests = 0
        self._touched = False
        self._threads = _threads(ctx)

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def ctx(self) -> llama_cpp.llama_context_p:
        """The context as it is now; None where it could not be made again."""
        return self.holder.ctx

    @property
    def n_cells(self) -> int:
        """Cells of the context at first."""
        return self._n_cells

    @property
    def used_cells(self) -> int:
        """Cells that hold a token."""
        return len(self._held)

    @property
    def committed_cells(self) -> int:
        """Cells of the context now."""
        return self._committed_cells

    @property
    def bytes_per_cell(self) -> int:
        """What one more cell adds to a saved state: K and V of all layers, and a few bytes to tell its position."""
        return self._bytes_per_cell

    @property
    def capacity_bytes(self) -> int:
        """Size of the cache at first."""
        return self.n_cells * self.bytes_per_cell

    @property
    def floor_cells(self) -> int:
        """The protected tokens and room for one eviction, rounded up to a size that a context can have."""
        wanted = self.settings.keep + self._tail + self.settings.min_prune
        return min(max(_round_up(wanted), self._least_cells), self.n_cells)

    def resident_bytes(self) -> int:
        """Bytes of the cache: llama.cpp writes all of it when the context is made. Not the kernel's count."""
        return self.committed_cells * self.bytes_per_cell

    def first_gap(self, seq_id: int) -> int:  # noqa: ARG002 - there is one sequence only
        """First position that the sequence has lost (or not reached yet)."""
        return self._held.gap

    @property
    def _tail(self) -> int:
        return max(self.settings.tail, self._n_swa)

    @property
    def _step_cells(self) -> int:
        return _round_up(int(self.pace.min_step_share * self.n_cells))

    # -- what a governor needs, from any thread -------------------------------------------------------------------

    def status(self) -> CacheStatus:
        """For the control law; in use is the whole context, as shrinking it is what gives memory back."""
        per_cell = self.bytes_per_cell
        return CacheStatus(
            self.capacity_bytes, self.committed_cells * per_cell, self.floor_cells * per_cell, self.returned_bytes
        )

    def give_now(self) -> int | None:
        """Shrink to the limit between two requests; the bytes given, None while somebody may read the logits."""
        if not self._busy.acquire(blocking=False):
            return None
        try:
            if self._requests or self._touched or not self.ctx:
                return None
            done = self._shrink_if_due()
            return done.returned_bytes if done else 0
        except RebuildError as error:
            log.warning("kvpsi: %s", error)
            return 0
        finally:
            self._busy.release()

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """Keep a governor's thread out for a while, with a context in place.

        Raises:
            RebuildError: there is none, and it still cannot be made.
        """
        with self._busy:
            self._revive()
            yield

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Lasts as long as somebody samples from the context between decodes: only these rebuild it meanwhile."""
        with self._busy:
            self._requests += 1
        try:
            yield
        finally:
            self._requests -= 1
            self._touched = self._requests > 0

    # -- decoding ------------------------------------------------------------------------------------------------

    def _next_pos(self, batch: llama_cpp.llama_batch) -> int:
        return 0 if batch.pos else self._held.last + 1

    def _resize_if_due(self) -> None:
        self._touch()
        self._shrink_if_due()

    def _most_at_once(self) -> int:
        room = self._reachable_cells() - self.settings.keep - self._tail
        return min(super()._most_at_once(), max(room, self.settings.min_prune))

    def _make_room(self, n_tokens: int) -> None:
        self._have_cells(n_tokens)
        if n_tokens > llama_cpp.llama_n_batch(self.ctx) and self.committed_cells < self.n_cells:
            raise self._refuse(n_tokens, n_tokens - self.committed_cells)  # llama.cpp would end the process

    def _decode_piece(self, batch: llama_cpp.llama_batch, tokens: Tokens, divisible: bool) -> int:
        at_once = len(tokens) <= self._n_ubatch
        with self._interruptibly(self.ctx, divisible and at_once):
            code = int(llama_cpp.llama_decode(self.ctx, batch))
        if code == DECODE_OK:
            self._held.add(tokens.pos)
            self._shift_pending = False
        elif code < -1 or (code == DECODE_ABORTED and not at_once):
            self._distrust(f"llama_decode returned {code}, after which the positions held are not known")
        return code

    # -- the same operations as llama.cpp's ----------------------------------------------------------------------

    @exclusive
    def clear(self) -> None:
        """`llama_memory_clear`; the context keeps its size."""
        self._drop_saved()
        self._touch()
        llama_cpp.llama_memory_clear(self.holder.memory, False)
        self._held = Positions()
        self.distrust_reason = None
        self._shift_pending = False

    @exclusive
    def seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """`llama_memory_seq_rm`."""
        self._touch()
        done = bool(llama_cpp.llama_memory_seq_rm(self.holder.memory, seq_id, p0, p1))
        if done and seq_id <= _ONLY_SEQUENCE:
            self._held.remove(p0, p1)
        return done

    @exclusive
    def seq_keep(self, seq_id: int) -> None:
        """`llama_memory_seq_keep`."""
        self._touch()
        llama_cpp.llama_memory_seq_keep(self.holder.memory, seq_id)
        if seq_id != _ONLY_SEQUENCE:
            self._held = Positions()

    @exclusive
    def seq_cp(self, src: int, dst: int, p0: int, p1: int) -> None:  # noqa: ARG002 - as llama.cpp's
        """`llama_memory_seq_cp`, for the one sequence that there is.

        Raises:
            UsageError: source or target is another one.
        """
        _refuse_others(src)
        _refuse_others(dst)

    @exclusive
    def seq_add(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        """`llama_memory_seq_add`; llama.cpp rotates the keys at the next decode, until which nothing is rebuilt."""
        _refuse_others(seq_id)
        self._touch()
        llama_cpp.llama_memory_seq_add(self.holder.memory, seq_id, p0, p1, shift)
        self._held.shift(p0, p1, shift)
        self._shift_pending = True

    @exclusive
    def load_sequence(self, state: bytes, seq_id: int) -> bool:
        """`llama_state_seq_set_data` of a sequence's saved state, through the gate. False if llama.cpp refused it.

        Raises:
            CacheRefusedError: the state's cells do not fit below ``limit_cells``.
            LayoutError: the bytes are not a sequence's state.
        """
        _refuse_others(seq_id)
        positions = np.array(parse_state(state)[0].positions, dtype=np.int32)
        self.seq_rm(seq_id, -1, -1)
        self._shrink_if_due()
        self._have_cells(len(positions))
        source = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        loaded = bool(llama_cpp.llama_state_seq_set_data(self.ctx, source, len(state), seq_id))
        if loaded:
            self._held.add(positions)
        else:
            self.seq_rm(seq_id, -1, -1)
        self._touched = False  # there are no logits that somebody could read
        return loaded

    # -- the gate and eviction -----------------------------------------------------------------------------------

    def _have_cells(self, n_tokens: int) -> None:
        """Grow, else evict, until so many tokens more fit."""
        if self.used_cells + n_tokens > self.committed_cells:
            self._grow(self.used_cells + n_tokens)
        missing = self.used_cells + n_tokens - self.committed_cells
        if missing <= 0 or self.committed_cells == self.n_cells or not self.trusted:
            return  # a cache that is full of its own accord is llama.cpp's to refuse
        trim = self.evict(max(missing, self.settings.min_prune))
        if trim.freed_cells < missing:
            raise self._refuse(n_tokens, missing - trim.freed_cells)

    @exclusive
    def evict(self, n_cells: int) -> Trim:
        """Forget the oldest ``n_cells`` tokens that may go, fewer if not so many may. The context keeps its size."""
        self._revive()
        freed = 0
        chosen = self._held.between(self.settings.keep, self._tail, n_cells) if self.trusted else []
        for first, end in chosen:
            if llama_cpp.llama_memory_seq_rm(self.holder.memory, _ONLY_SEQUENCE, first, end):
                self._held.remove(first, end)
                freed += end - first
                if self.on_forgotten:
                    self.on_forgotten(Forgotten(_ONLY_SEQUENCE, first, end))
        trim = Trim(n_cells, freed, NOTHING)
        if freed:
            self.trims += 1
            self.instrument.event("trim", trim)
        return trim

    # -- choosing a size -----------------------------------------------------------------------------------------

    def _fitting(self, cells: int) -> int:
        """The largest size of a context that has at most so many cells, but not less than the floor."""
        if cells >= self.n_cells:
            return self.n_cells
        return max(cells // _CELLS_STEP * _CELLS_STEP, self.floor_cells)

    def _smaller_cells(self) -> int | None:
        """The size to shrink to now; None if that is not due."""
        if self.committed_cells <= self.allowed_cells:
            return None
        target = self._fitting(self.allowed_cells)
        if self.committed_cells <= max(self.cap_cells, self.floor_cells):
            if self._clock() - self._rebuilt_at_s < self.pace.min_interval_s:
                return None
            whole_step = self._fitting(max(0, self.committed_cells - self._step_cells))
            if _round_up(self.used_cells) <= target:  # nothing need be forgotten now, nor for a while
                whole_step = max(whole_step, _round_up(self.used_cells + _CELLS_STEP))
            target = min(target, whole_step)
        return target if target < self.committed_cells else None

    def _reachable_cells(self) -> int:
        """The size to which the context could grow, with the copy of its tokens beside it for a moment."""
        by_memory = self.n_cells if self.limit_cells >= self.n_cells else self.limit_cells - self.used_cells
        user_limit = self._fitting(self.cap_cells)
        reachable = min(self._fitting(by_memory), user_limit)
        step = min(self._step_cells, user_limit - self.committed_cells)
        worthwhile = reachable > self.committed_cells and reachable - self.committed_cells >= step
        possible = self._clock() >= self._grow_from_s and self._can_rebuild()
        return reachable if worthwhile and possible else self.committed_cells

    def _shrink_if_due(self) -> Rebuild | None:
        target = self._smaller_cells()
        if target is None or not self._can_rebuild():
            return None
        if self.used_cells > target:
            self.evict(self.used_cells - target)
        target = max(target, _round_up(self.used_cells))
        return self._rebuild(target) if target < self.committed_cells else None

    def _grow(self, cells: int) -> None:
        reachable = self._reachable_cells()
        if reachable > self.committed_cells:
            self._rebuild(min(reachable, _round_up(max(cells, self.committed_cells + self._step_cells))))

    # -- rebuilding ----------------------------------------------------------------------------------------------

    def _can_rebuild(self) -> bool:
        if not self.trusted or self._shift_pending:
            return False
        if int(llama_cpp.llama_memory_seq_pos_max(self.holder.memory, _ONLY_SEQUENCE)) != self._held.last:
            self._distrust("the sequence was changed without going through kvpsi")
        return self.trusted

    def _rebuild(self, wanted: int) -> Rebuild | None:
        """Resize, or go back to the size before; None if there is no memory for the copy and nothing was done.

        Raises:
            RebuildError: there is no context now, or it has lost its tokens; see `_reopen`.
        """
        started, before, rss = self._clock(), self.committed_cells, _rss_bytes()
        self._rebuilt_at_s = started
        try:
            self._saved = _save(self.ctx)
        except RebuildError as error:
            self._grow_from_s = started + self.pace.min_interval_s
            log.warning("kvpsi: %s", error)
            return None
        saved_bytes = len(self._saved) if self._saved else 0
        self._threads = _threads(self.ctx)
        self._free()
        self._reopen([wanted, before])
        self._rebuilt_at_s = self._clock()
        fell = max(0, rss - _rss_bytes())
        done = Rebuild(before, wanted, self.committed_cells, saved_bytes, fell, self._rebuilt_at_s - started)
        if done.to_cells < before:
            self.releases += 1
            self.returned_bytes += done.returned_bytes
        if done.to_cells != wanted:
            self._grow_from_s = self._rebuilt_at_s + self.pace.min_interval_s
            log.warning("kvpsi: no memory for a context of %d cells, so it stays at %d.", wanted, done.to_cells)
        self.instrument.event("rebuild", done)
        return done

    def _reopen(self, sizes: Sequence[int]) -> None:
        """Make a context of the first size that works, and load the saved tokens; the last size had held them.

        Raises:
            RebuildError: none could be made (the tokens stay saved, the next operation tries again), or it refused
                its own tokens even at the size that had held them (it is empty then).
        """
        before, refused = sizes[-1], False
        for cells in dict.fromkeys([*sizes, max(_round_up(self.used_cells), self.floor_cells)]):
            if not self._open(cells):
                continue
            if _load(self.ctx, self._saved):
                self._drop_saved()
                self._on_rebuilt(True)
                return
            refused = refused or cells >= before
            self._free()
        self._committed_cells = before
        if refused:
            self._lose_tokens(sizes)
        raise RebuildError(
            f"There is no memory for a context of {min(sizes)} cells; the conversation is kept, so free memory and "
            "try again."
        )

    def _lose_tokens(self, sizes: Sequence[int]) -> None:
        self._drop_saved()
        self._held = Positions()
        any(self._open(cells) for cells in sizes)
        self._on_rebuilt(False)
        raise RebuildError(
            "llama.cpp would not take the saved conversation back, so the cache is empty now; send the request again "
            "and it is computed anew."
        )

    def _open(self, cells: int) -> bool:
        params = type(self.holder.params).from_buffer_copy(self.holder.params)
        params.n_ctx = cells
        params.n_threads, params.n_threads_batch = self._threads
        ctx = llama_cpp.llama_init_from_model(self.holder.model.model, params)
        if not ctx:
            return False
        self.holder.ctx, self.holder.memory = ctx, llama_cpp.llama_get_memory(ctx)
        self._committed_cells = int(llama_cpp.llama_n_ctx(ctx))
        self._n_ubatch = int(llama_cpp.llama_n_ubatch(ctx))
        if self._equip(ctx):
            return True
        self._free()
        return False

    def _free(self) -> None:
        ctx, self.holder.ctx, self.holder.memory = self.ctx, None, None
        llama_cpp.llama_free(ctx)
        pages.trim_heap()

    def _drop_saved(self) -> None:
        if self._saved is not None:
            self._saved.close()
            self._saved = None

    def _touch(self) -> None:
        """The engine is about to use the context."""
        self._revive()
        self._touched = True

    def _revive(self) -> None:
        """Try again to make a context that could not be made."""
        if not self.ctx:
            self._reopen([self.committed_cells])

    def _distrust(self, reason: str) -> None:
        if self.distrust_reason is None:
            self.distrust_reason = reason
            log.warning("kvpsi stops resizing until the cache is cleared: %s.", reason)
            self.instrument.event("distrust", reason)

    # -- the end -------------------------------------------------------------------------------------------------

    @exclusive
    def restore_capacity(self) -> None:
        """Give the context its first size back, as far as there is memory."""
        self._revive()
        if self.committed_cells < self.n_cells and not self._shift_pending:
            self._rebuild(self.n_cells)


def _round_up(cells: int) -> int:
    return -(-cells // _CELLS_STEP) * _CELLS_STEP


def _refuse_others(seq_id: int) -> None:
    if seq_id != _ONLY_SEQUENCE:
        raise UsageError(f"Sequence {seq_id} would be lost when the context is rebuilt; use sequence 0 only.")


def _threads(ctx: llama_cpp.llama_context_p) -> tuple[int, int]:
    return int(llama_cpp.llama_n_threads(ctx)), int(llama_cpp.llama_n_threads_batch(ctx))


def _rss_bytes() -> int:
    try:
        return pages.process_rss_bytes()
    except OSError:  # no /proc: nothing is credited
        return 0


def _measure_cell(ctx: llama_cpp.llama_context_p) -> int:
    """Bytes that one more token adds to the state of an *empty* context; it is empty again afterwards."""
    memory = llama_cpp.llama_get_memory(ctx)
    vocab = llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(ctx))
    token = (llama_cpp.llama_token * 1)(llama_cpp.llama_vocab_n_tokens(vocab) // 2)
    sizes = []
    llama_cpp.llama_memory_clear(memory, False)
    try:
        for _ in range(2):
            code = int(llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(token, 1)))
            if code != DECODE_OK:
                raise LayoutError(f"The context would not decode a probe token (llama_decode returned {code}).")
            sizes.append(int(llama_cpp.llama_state_seq_get_size(ctx, _ONLY_SEQUENCE)))
    finally:
        llama_cpp.llama_memory_clear(memory, False)
    if sizes[1] <= sizes[0]:
        raise LayoutError("The context's saved state does not grow with its tokens, so it cannot be carried over.")
    return sizes[1] - sizes[0]


def _metadata(model: llama_cpp.llama_model_p, key: str) -> str:
    buffer = ctypes.create_string_buffer(256)
    length = int(llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer)))
    return buffer.value.decode("utf-8", "replace") if length >= 0 else ""


def _least_cells(model: llama_cpp.llama_model_p, n_cells: int) -> int:
    """Cells below which the context would compute positions differently.

    llama.cpp chooses between the short and the long frequency factors of a LongRoPE model by the size of the context
    (`llama_model::get_rope_factors`); keys of one kind are of no use to the other.
    """
    arch = _metadata(model, "general.architecture")
    trained = _metadata(model, f"{arch}.rope.scaling.original_context_length")
    by_size = _metadata(model, f"{arch}.rope.scaling.type") not in ("linear", "yarn")
    if trained.isdigit() and by_size and n_cells > int(trained):
        return _round_up(int(trained) + 1)
    return 0


def _save(ctx: llama_cpp.llama_context_p) -> mmap.mmap | None:
    """The sequence's state in memory of its own, all of which goes back when it is closed; None if it is empty."""
    if int(llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(ctx), _ONLY_SEQUENCE)) < 0:
        return None
    size = int(llama_cpp.llama_state_seq_get_size(ctx, _ONLY_SEQUENCE))
    try:
        saved = mmap.mmap(-1, size)
    except OSError as error:
        raise RebuildError(f"There is no memory for a copy of the conversation ({error}); free some.") from error
    if int(llama_cpp.llama_state_seq_get_data(ctx, _bytes_of(saved), size, _ONLY_SEQUENCE)) != size:
        saved.close()
        raise RebuildError("llama.cpp would not save the conversation's state, so the context keeps its size.")
    return saved


def _load(ctx: llama_cpp.llama_context_p, saved: mmap.mmap | None) -> bool:
    if saved is None:
        return True
    return bool(llama_cpp.llama_state_seq_set_data(ctx, _bytes_of(saved), len(saved), _ONLY_SEQUENCE))


def _bytes_of(saved: mmap.mmap) -> Any:
    return (ctypes.c_uint8 * len(saved)).from_buffer(saved)
