"""The one sequence of a context that is rebuilt: llama.cpp's operations on it, and a record of what it holds."""

from __future__ import annotations

import llama_cpp
import numpy as np

from kvpsi.errors import UsageError
from kvpsi.kv.cells import IntArray
from kvpsi.kv.rebuild.context import ONLY_SEQUENCE, ContextHolder
from kvpsi.kv.rebuild.positions import Positions
from kvpsi.kv.statedata import StateBytes, address_of, parse_state


class OneSequence:
    """Sequence 0 of the context in ``holder``, which need not be the same context all the time.

    ``held`` are its positions. While ``shift_pending`` is true, keys wait to be rotated by the next decode; a state
    saved meanwhile would miss that.
    """

    def __init__(self, holder: ContextHolder) -> None:
        self._holder = holder
        self.held = Positions()
        self.shift_pending = False

    def decoded(self, pos: IntArray) -> None:
        """Take note of the positions, shape [n], that a decode added."""
        self.held.add(pos)
        self.shift_pending = False

    def lost(self) -> None:
        """Take note that all tokens are gone."""
        self.held = Positions()

    def changed_elsewhere(self) -> bool:
        """Whether llama.cpp's last position is not the one of the record."""
        return int(llama_cpp.llama_memory_seq_pos_max(self._holder.memory, ONLY_SEQUENCE)) != self.held.last

    def clear(self) -> None:
        """`llama_memory_clear`."""
        llama_cpp.llama_memory_clear(self._holder.memory, False)
        self.lost()
        self.shift_pending = False

    def remove(self, seq_id: int, p0: int, p1: int) -> bool:
        """`llama_memory_seq_rm`."""
        done = bool(llama_cpp.llama_memory_seq_rm(self._holder.memory, seq_id, p0, p1))
        if done and seq_id <= ONLY_SEQUENCE:
            self.held.remove(p0, p1)
        return done

    def keep(self, seq_id: int) -> None:
        """`llama_memory_seq_keep`."""
        llama_cpp.llama_memory_seq_keep(self._holder.memory, seq_id)
        if seq_id != ONLY_SEQUENCE:
            self.lost()

    def shift(self, p0: int, p1: int, by: int) -> None:
        """`llama_memory_seq_add`."""
        llama_cpp.llama_memory_seq_add(self._holder.memory, ONLY_SEQUENCE, p0, p1, by)
        self.held.shift(p0, p1, by)
        self.shift_pending = True

    def load(self, state: StateBytes, positions: IntArray) -> bool:
        """`llama_state_seq_set_data` of a state with these positions; False, and empty, if llama.cpp refused it."""
        loaded = bool(
            llama_cpp.llama_state_seq_set_data(self._holder.ctx, address_of(state), len(state), ONLY_SEQUENCE)
        )
        if loaded:
            self.held.add(positions)
        else:
            self.remove(ONLY_SEQUENCE, -1, -1)
        return loaded


def positions_of(state: StateBytes) -> IntArray:
    """The positions that a sequence's saved state holds, shape [n].

    Raises:
        LayoutError: the bytes are not a sequence's state.
    """
    return np.array(parse_state(state)[0].positions, dtype=np.int32)


def refuse_others(seq_id: int) -> None:
    """Only one sequence is carried over to a new context.

    Raises:
        UsageError: it is another one.
    """
    if seq_id != ONLY_SEQUENCE:
        raise UsageError(f"Sequence {seq_id} would be lost when the context is rebuilt; use sequence 0 only.")
