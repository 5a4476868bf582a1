"""The context that is rebuilt: its state is saved, it is freed, made again in another size, and the state loaded."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import llama_cpp

from kvpsi.errors import RebuildError
from kvpsi.kv import pages

log = logging.getLogger("kvpsi")

ONLY_SEQUENCE = 0
"""The sequence that is carried over."""


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


class RebuiltContext:
    """Replaces the context in ``holder`` by one of another size that holds the same tokens.

    ``cells`` is its size now, ``n_ubatch`` the most tokens that it computes at once. While there is no context, as
    no memory was found for one, ``cells`` is the last size, the tokens stay saved, and `revive` tries again.

    Args:
        equip: attaches to a new context what else the first one had; False if that failed.
        on_rebuilt: called when there is a new context; with False where the tokens are gone.
        clock: the time in seconds.
    """

    def __init__(
        self,
        holder: ContextHolder,
        equip: Callable[[llama_cpp.llama_context_p], bool],
        on_rebuilt: Callable[[bool], None],
        clock: Callable[[], float],
    ) -> None:
        self.holder = holder
        self.cells = int(llama_cpp.llama_n_ctx(holder.ctx))
        self.n_ubatch = int(llama_cpp.llama_n_ubatch(holder.ctx))
        self._equip, self._on_rebuilt, self._clock = equip, on_rebuilt, clock
        self._threads = _threads(holder.ctx)
        self._saved: mmap.mmap | None = None

    def resize(self, wanted: int, needed: int) -> Rebuild | None:
        """Resize, or go back to the size before; None if there is no memory for the copy and nothing was done.

        Args:
            wanted: the new size in cells.
            needed: the least size in cells that holds the tokens, tried when even the size before cannot be had.

        Raises:
            RebuildError: there is no context now, or it has lost its tokens.
        """
        started, before, rss = self._clock(), self.cells, _rss_bytes()
        try:
            self._saved = _save(self.holder.ctx)
        except RebuildError as error:
            log.warning("kvpsi: %s", error)
            return None
        saved_bytes = len(self._saved) if self._saved else 0
        self._threads = _threads(self.holder.ctx)
        self._free()
        self._reopen([wanted, before], needed)
        seconds = self._clock() - started
        return Rebuild(before, wanted, self.cells, saved_bytes, max(0, rss - _rss_bytes()), seconds)

    def revive(self, needed: int) -> None:
        """Try again to make a context where there is none; ``needed`` as for `resize`.

        Raises:
            RebuildError: there is still none, or it has lost its tokens.
        """
        self._reopen([self.cells], needed)

    def drop_saved(self) -> None:
        """Forget the tokens that wait for a context."""
        if self._saved is not None:
            self._saved.close()
            self._saved = None

    def _reopen(self, sizes: Sequence[int], needed: int) -> None:
        """Make a context of the first size that works, and load the saved tokens; the last size had held them.

        Raises:
            RebuildError: none could be made (the tokens stay saved, the next operation tries again), or it refused
                its own tokens even at the size that had held them (it is empty then).
        """
        before, refused = sizes[-1], False
        for cells in dict.fromkeys([*sizes, needed]):
            if not self._open(cells):
                continue
            if _load(self.holder.ctx, self._saved):
                self.drop_saved()
                self._on_rebuilt(True)
                return
            refused = refused or cells >= before
            self._free()
        self.cells = before
        if refused:
            self._lose_tokens(sizes)
        raise RebuildError(
            f"There is no memory for a context of {min(sizes)} cells; the conversation is kept, so free memory and "
            "try again."
        )

    def _lose_tokens(self, sizes: Sequence[int]) -> None:
        self.drop_saved()
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
        self.cells = int(llama_cpp.llama_n_ctx(ctx))
        self.n_ubatch = int(llama_cpp.llama_n_ubatch(ctx))
        if self._equip(ctx):
            return True
        self._free()
        return False

    def _free(self) -> None:
        ctx, self.holder.ctx, self.holder.memory = self.holder.ctx, None, None
        llama_cpp.llama_free(ctx)
        pages.trim_heap()


def _threads(ctx: llama_cpp.llama_context_p) -> tuple[int, int]:
    return int(llama_cpp.llama_n_threads(ctx)), int(llama_cpp.llama_n_threads_batch(ctx))


def _rss_bytes() -> int:
    try:
        return pages.process_rss_bytes()
    except OSError:  # no /proc: nothing is credited
        return 0


def _save(ctx: llama_cpp.llama_context_p) -> mmap.mmap | None:
    """The sequence's state in memory of its own, all of which goes back when it is closed; None if it is empty."""
    if int(llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(ctx), ONLY_SEQUENCE)) < 0:
        return None
    size = int(llama_cpp.llama_state_seq_get_size(ctx, ONLY_SEQUENCE))
    try:
        saved = mmap.mmap(-1, size)
    except OSError as error:
        raise RebuildError(f"There is no memory for a copy of the conversation ({error}); free some.") from error
    if int(llama_cpp.llama_state_seq_get_data(ctx, _bytes_of(saved), size, ONLY_SEQUENCE)) != size:
        saved.close()
        raise RebuildError("llama.cpp would not save the conversation's state, so the context keeps its size.")
    return saved


def _load(ctx: llama_cpp.llama_context_p, saved: mmap.mmap | None) -> bool:
    if saved is None:
        return True
    return bool(llama_cpp.llama_state_seq_set_data(ctx, _bytes_of(saved), len(saved), ONLY_SEQUENCE))


def _bytes_of(saved: mmap.mmap) -> Any:
    return (ctypes.c_uint8 * len(saved)).from_buffer(saved)
