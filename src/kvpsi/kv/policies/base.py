"""What an eviction policy is: a score for each cell. Protection, blocks and amounts are dealt with here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kvpsi.kv.cells import EMPTY, BoolArray, IntArray, StreamCells

ScalarT = TypeVar("ScalarT", bound=np.generic)
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class CellView:
    """The cells of one stream as a policy sees them.

    ``pos`` [n_cells] holds positions (``EMPTY`` where free), ``owner`` [n_cells, n_seq] who sees a cell,
    ``protected`` [n_cells] what must stay: the first ``keep`` and last ``tail`` positions of each sequence.
    """

    pos: IntArray
    owner: BoolArray
    protected: BoolArray
    block_cells: int

    @property
    def evictable(self) -> BoolArray:
        """Mask of the cells that may go."""
        evictable: BoolArray = (self.pos != EMPTY) & ~self.protected
        return evictable


def view_of(cells: StreamCells, *, keep: int, tail: int, block_cells: int) -> CellView:
    """A view of a stream with the first ``keep`` and last ``tail`` tokens of each sequence protected."""
    protected = np.zeros(cells.n_cells, dtype=np.bool_)
    for seq_id in np.flatnonzero(cells.owner.any(axis=0)):
        mine = cells.cells_of(int(seq_id))
        by_pos = mine[np.argsort(cells.pos[mine], kind="stable")]
        protected[by_pos[:keep]] = True
        protected[by_pos[max(0, len(by_pos) - tail) :]] = True
    return CellView(_read_only(cells.pos), _read_only(cells.owner), protected, block_cells)


def _read_only(array: npt.NDArray[ScalarT]) -> npt.NDArray[ScalarT]:
    """What a policy must not change: a wrong record of the cells would cost live ones."""
    view: npt.NDArray[ScalarT] = array.view()
    view.setflags(write=False)
    return view


class EvictionPolicy:
    """Base of all policies: say how much each cell is worth, the cheapest blocks go first."""

    def score(self, view: CellView) -> FloatArray:
        """Worth of each cell, shape [n_cells]; the lowest goes first. Free and protected cells are ignored."""
        raise NotImplementedError

    def choose(self, view: CellView, n_cells: int) -> IntArray:
        """Cells to evict: whole blocks of neighbours, so that whole pages become free, until ``n_cells`` are found.

        Returns fewer when fewer may go.
        """
        candidates = np.flatnonzero(view.evictable)
        if n_cells <= 0 or not candidates.size:
            return np.empty(0, dtype=np.int32)
        score = self.score(view)
        block = candidates // view.block_cells
        counts = np.bincount(block)
        ids = np.flatnonzero(counts)
        worth = np.bincount(block, weights=score[candidates])[ids] / counts[ids]
        ranked = ids[np.argsort(worth, kind="stable")]
        enough = int(np.searchsorted(np.cumsum(counts[ranked]), n_cells)) + 1
        goes = np.zeros(len(counts), dtype=np.bool_)
        goes[ranked[:enough]] = True
        return candidates[goes[block]].astype(np.int32)
