"""A context whose cache stays as llama.cpp made it: for comparison, and where no memory can be given back."""

from __future__ import annotations

import mmap

import llama_cpp

from kvpsi.kv.gated import DECODE_ABORTED, DECODE_OK, CacheSettings, GatedCache, Trim, exclusive
from kvpsi.kv.layout import seq_state_apart
from kvpsi.kv.statedata import StateBytes, address_of
from kvpsi.kv.tracker import NOTHING
from kvpsi.kv.ubatch import Tokens
from kvpsi.status import CacheStatus


class FixedCache(GatedCache):
    """Every cell stays committed, nothing is forgotten, and a governor's limit changes nothing.

    ``used_cells`` counts cells that several sequences share for each of them.
    """

    mode = "fixed"

    def __init__(self, ctx: llama_cpp.llama_context_p, *, settings: CacheSettings | None = None) -> None:
        self.ctx = ctx
        self._memory = llama_cpp.llama_get_memory(ctx)
        self._n_seq = int(llama_cpp.llama_n_seq_max(ctx))
        self._n_ubatch = int(llama_cpp.llama_n_ubatch(ctx))
        self._n_swa = int(llama_cpp.llama_model_n_swa(llama_cpp.llama_get_model(ctx)))
        self._n_cells = int(llama_cpp.llama_n_ctx(ctx))
        self._used_cells = 0
        super().__init__(settings, None, None)
        self._count()

    @property
    def n_cells(self) -> int:
        """Cells over all streams."""
        return self._n_cells

    @property
    def used_cells(self) -> int:
        """Cells that hold a token, as far as positions tell; counted by the engine's thread, so any may read it."""
        return self._used_cells

    def _count(self) -> None:
        held = [(self._first(s), self._last(s)) for s in range(self._n_seq)]
        self._used_cells = min(self._n_cells, sum(last - first + 1 for first, last in held if last >= 0))

    @property
    def committed_cells(self) -> int:
        """All of them."""
        return self.n_cells

    @property
    def bytes_per_cell(self) -> int:
        """K and V of all layers, as 16-bit numbers: an upper estimate."""
        model = llama_cpp.llama_get_model(self.ctx)
        n_embd, n_head = llama_cpp.llama_model_n_embd(model), llama_cpp.llama_model_n_head(model)
        width = n_embd // max(1, n_head) * llama_cpp.llama_model_n_head_kv(model)
        return max(1, int(2 * 2 * width * llama_cpp.llama_model_n_layer(model)))

    @property
    def capacity_bytes(self) -> int:
        """Size of the whole cache."""
        return self.n_cells * self.bytes_per_cell

    @property
    def floor_cells(self) -> int:
        """All cells: it cannot shrink."""
        return self.n_cells

    def resident_bytes(self) -> int:
        """All of it: llama.cpp writes over it when it starts."""
        return self.capacity_bytes

    def first_gap(self, seq_id: int) -> int:
        """The position after the last: nothing is ever lost."""
        return self._last(seq_id) + 1

    def _first(self, seq_id: int) -> int:
        return int(llama_cpp.llama_memory_seq_pos_min(self._memory, seq_id))

    def _last(self, seq_id: int) -> int:
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, seq_id))

    def status(self) -> CacheStatus:
        """Nothing can be given."""
        return CacheStatus(self.capacity_bytes, self.used_cells * self.bytes_per_cell, self.capacity_bytes)

    def give_now(self) -> int | None:
        """Nothing."""
        return 0

    def _next_pos(self, batch: llama_cpp.llama_batch) -> int:
        return 0 if batch.pos else self._last(0) + 1

    def _make_room(self, n_tokens: int) -> None:
        pass

    def _decode_piece(self, batch: llama_cpp.llama_batch, tokens: Tokens, stoppable: bool) -> int:
        with self._computing(self.ctx, stoppable and len(tokens) <= self._n_ubatch):
            code = int(llama_cpp.llama_decode(self.ctx, batch))
        if code not in (DECODE_OK, DECODE_ABORTED) and code < -1:
            self.distrust_reason = f"llama_decode returned {code}, after which the tokens held are not known"
        self._count()
        return code

    @exclusive
    def clear(self) -> None:
        """`llama_memory_clear`."""
        llama_cpp.llama_memory_clear(self._memory, False)
        self._used_cells = 0
        self.distrust_reason = None

    @exclusive
    def seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """`llama_memory_seq_rm`."""
        done = bool(llama_cpp.llama_memory_seq_rm(self._memory, seq_id, p0, p1))
        self._count()
        return done

    @exclusive
    def seq_keep(self, seq_id: int) -> None:
        """`llama_memory_seq_keep`."""
        llama_cpp.llama_memory_seq_keep(self._memory, seq_id)
        self._count()

    @exclusive
    def seq_cp(self, src: int, dst: int, p0: int, p1: int) -> None:
        """`llama_memory_seq_cp`."""
        llama_cpp.llama_memory_seq_cp(self._memory, src, dst, p0, p1)
        self._count()

    @exclusive
    def seq_add(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        """`llama_memory_seq_add`."""
        llama_cpp.llama_memory_seq_add(self._memory, seq_id, p0, p1, shift)

    @exclusive
    def save_sequence(self, seq_id: int) -> mmap.mmap:
        """`llama_state_seq_get_data` into memory of its own.

        Raises:
            LayoutError: llama.cpp saved nothing.
        """
        return seq_state_apart(self.ctx, seq_id)

    @exclusive
    def load_sequence(self, state: StateBytes, seq_id: int) -> bool:
        """`llama_state_seq_set_data`. False if llama.cpp refused it."""
        llama_cpp.llama_memory_seq_rm(self._memory, seq_id, -1, -1)
        loaded = bool(llama_cpp.llama_state_seq_set_data(self.ctx, address_of(state), len(state), seq_id))
        self._count()
        return loaded

    @property
    def forgettable_bytes(self) -> int:
        """Nothing."""
        return 0

    def evict(self, n_cells: int) -> Trim:
        """Nothing."""
        return Trim(n_cells, 0, NOTHING)

    def restore_capacity(self) -> None:
        """It has it."""
