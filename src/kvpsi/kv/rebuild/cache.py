"""A llama.cpp context that gives memory back as a whole: saved, freed, made again with fewer cells, and loaded.

For caches whose pages cannot be given back one by one: in GPU buffers, arranged in an unknown way, or not on Linux.
It costs a copy of the tokens in use and a moment in which nothing is decoded, so steps are large and rare. Not
verified on a CUDA or other GPU build: nothing here depends on where the cells lie, but it was run on a CPU only.

This file is the cache that a governor and an engine see. When it is resized is in resizing.py, to which size in
sizes.py, how the context is replaced in context.py, what its sequence holds in sequence.py, and
what is measured before in probe.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import llama_cpp

from kvpsi.errors import RebuildError
from kvpsi.kv.gated import DECODE_ABORTED, DECODE_OK, exclusive
from kvpsi.kv.rebuild.context import Rebuild
from kvpsi.kv.rebuild.resizing import ResizedCache
from kvpsi.kv.rebuild.sequence import positions_of, refuse_others
from kvpsi.kv.rebuild.sizes import RebuildSettings
from kvpsi.kv.statedata import StateBytes
from kvpsi.kv.ubatch import Tokens
from kvpsi.status import CacheStatus

__all__ = ["Rebuild", "RebuildSettings", "RebuiltCache"]

log = logging.getLogger("kvpsi")


class RebuiltCache(ResizedCache):
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
    _requests = 0
    _touched = False  # used since the last request ended, so somebody may read the logits

    # -- what a governor needs, from any thread -------------------------------------------------------------------

    def status(self) -> CacheStatus:
        """For the control law; in use is the whole context, as shrinking it is what gives memory back."""
        per_cell = self.bytes_per_cell
        return CacheStatus(
            self.capacity_bytes,
            self.committed_cells * per_cell,
            self.floor_cells * per_cell,
            self.returned_bytes,
            forgotten_bytes=self.forgotten_cells * per_cell,
        )

    @property
    def given_bytes(self) -> dict[str, int]:
        """All that went back, by resizing."""
        return {"resized": self.returned_bytes}

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

    def _touch(self) -> None:
        """The engine is about to use the context."""
        self._revive()
        self._touched = True

    # -- decoding ------------------------------------------------------------------------------------------------

    def _next_pos(self, batch: llama_cpp.llama_batch) -> int:
        return 0 if batch.pos else self._sequence.held.last + 1

    def _resize_if_due(self) -> None:
        self._touch()
        self._shrink_if_due()

    def most_at_once(self) -> int:
        room = self._reachable_cells() - self.settings.keep - self._tail
        return min(super().most_at_once(), max(room, self.settings.min_prune))

    def _make_room(self, n_tokens: int) -> None:
        self._have_cells(n_tokens)
        if n_tokens > llama_cpp.llama_n_batch(self.ctx) and self.committed_cells < self.n_cells:
            raise self._refuse(n_tokens, n_tokens - self.committed_cells)  # llama.cpp would end the process

    def _decode_piece(self, batch: llama_cpp.llama_batch, tokens: Tokens, stoppable: bool) -> int:
        at_once = len(tokens) <= self._n_ubatch
        with self._computing(self.ctx, stoppable and at_once):
            code = int(llama_cpp.llama_decode(self.ctx, batch))
        if code == DECODE_OK:
            self._sequence.decoded(tokens.pos)
        elif code < -1 or (code == DECODE_ABORTED and not at_once):
            self._distrust(f"llama_decode returned {code}, after which the positions held are not known")
        return code

    # -- the same operations as llama.cpp's ----------------------------------------------------------------------

    @exclusive
    def clear(self) -> None:
        """`llama_memory_clear`; the context keeps its size."""
        self._context.drop_saved()
        self._touch()
        self._sequence.clear()
        self.distrust_reason = None

    @exclusive
    def seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """`llama_memory_seq_rm`."""
        self._touch()
        return self._sequence.remove(seq_id, p0, p1)

    @exclusive
    def seq_keep(self, seq_id: int) -> None:
        """`llama_memory_seq_keep`."""
        self._touch()
        self._sequence.keep(seq_id)

    @exclusive
    def seq_cp(self, src: int, dst: int, p0: int, p1: int) -> None:  # noqa: ARG002 - as llama.cpp's
        """`llama_memory_seq_cp`, for the one sequence that there is.

        Raises:
            UsageError: source or target is another one.
        """
        refuse_others(src)
        refuse_others(dst)

    @exclusive
    def seq_add(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        """`llama_memory_seq_add`; llama.cpp rotates the keys at the next decode, until which nothing is rebuilt."""
        refuse_others(seq_id)
        self._touch()
        self._sequence.shift(p0, p1, shift)

    @exclusive
    def load_sequence(self, state: StateBytes, seq_id: int) -> bool:
        """`llama_state_seq_set_data` of a sequence's saved state, through the gate. False if llama.cpp refused it.

        Raises:
            CacheRefusedError: the state's cells do not fit below ``limit_cells``; what was there is kept.
            LayoutError: the bytes are not a sequence's state.
        """
        refuse_others(seq_id)
        positions = positions_of(state)
        self._revive()
        self._ask_to_replace(len(positions))
        self.seq_rm(seq_id, -1, -1)
        self._shrink_if_due()
        self._have_cells(len(positions))
        loaded = self._sequence.load(state, positions)
        self._touched = False  # there are no logits that somebody could read
        return loaded

    # -- the end -------------------------------------------------------------------------------------------------

    @exclusive
    def restore_capacity(self) -> None:
        """Give the context its first size back, as far as there is memory."""
        self._revive()
        if self.committed_cells < self.n_cells and not self._sequence.shift_pending:
            self._rebuild(self.n_cells)
