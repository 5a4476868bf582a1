"""What an eviction policy is: a score for each cell. Protection, blocks and amounts are dealt with here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from kvpsi.kv.cells import EMPTY, BoolArray, IntArray, StreamCells
from kvpsi.kv.keys import Keys
from kvpsi.kv.segments import segments_of
from kvpsi.kv.turns import that_must_stay
from kvpsi.kv.vocabulary import Vocabulary

ScalarT = TypeVar("ScalarT", bound=np.generic)
FloatArray = npt.NDArray[np.float64]
IntArray64 = npt.NDArray[np.int64]

_SPARE_PART = 2


@dataclass(frozen=True, slots=True)
class CellView:
    """The cells of one stream as a policy sees them.

    Attributes:
        pos: positions, ``EMPTY`` where free; shape [n_cells].
        owner: who sees a cell; shape [n_cells, n_seq].
        protected: what must stay: the first ``keep`` and last ``tail`` positions of each sequence, its first turn, and
            the last one that has ended; shape [n_cells].
        block_cells: so many cells side by side are a block, of which most lies in whole pages.
        token: which token a cell holds, negative where that is not known; shape [n_cells].
        used_at: the larger, the later a sequence was decoded last; shape [n_seq].
        keys: the cells' keys; None where they cannot be read.
        vocabulary: what the tokens say; None where nobody knows.
        attention: how much a pending question attends to each cell, NaN where that is not known; None if no question
            is pending. Shape [n_cells].
    """

    pos: IntArray
    owner: BoolArray
    protected: BoolArray
    block_cells: int
    token: IntArray
    used_at: IntArray64
    keys: Keys | None = None
    vocabulary: Vocabulary | None = None
    attention: FloatArray | None = None

    @property
    def evictable(self) -> BoolArray:
        """Mask of the cells that may go."""
        evictable: BoolArray = (self.pos != EMPTY) & ~self.protected
        return evictable

    @property
    def blocks(self) -> IntArray:
        """The number of the block of each cell, shape [n_cells]."""
        return np.arange(len(self.pos), dtype=np.int32) // self.block_cells

    @property
    def segments(self) -> IntArray:
        """The number of the segment of each cell, -1 where it is free; see `kvpsi.kv.segments`. Shape [n_cells]."""
        ends = np.zeros(len(self.pos), dtype=np.bool_)
        if self.vocabulary is not None:
            ends = self.vocabulary.ends_sentence(self.token)
        return segments_of(self.pos, self.owner, ends)


def view_of(
    cells: StreamCells,
    *,
    keep: int,
    tail: int,
    block_cells: int,
    turn: int = 0,
    used_at: IntArray64 | None = None,
    keys: Keys | None = None,
    vocabulary: Vocabulary | None = None,
    attention: FloatArray | None = None,
) -> CellView:
    """A view of a stream; ``keep``, ``tail`` and ``turn`` are those of `kvpsi.kv.CacheSettings`, in tokens."""
    protected = np.zeros(cells.n_cells, dtype=np.bool_)
    for seq_id in np.flatnonzero(cells.owner.any(axis=0)):
        mine = cells.cells_of(int(seq_id))
        by_pos = mine[np.argsort(cells.pos[mine], kind="stable")]
        protected[by_pos[:keep]] = True
        protected[by_pos[max(0, len(by_pos) - tail) :]] = True
        if vocabulary is not None and turn:
            protected[by_pos[that_must_stay(vocabulary.ends_turn(cells.token[by_pos]), turn)]] = True
    return CellView(
        pos=_read_only(cells.pos),
        owner=_read_only(cells.owner),
        protected=protected,
        block_cells=block_cells,
        token=_read_only(cells.token),
        used_at=np.zeros(cells.owner.shape[1], dtype=np.int64) if used_at is None else used_at,
        keys=keys,
        vocabulary=vocabulary,
        attention=attention,
    )


def _read_only(array: npt.NDArray[ScalarT]) -> npt.NDArray[ScalarT]:
    """What a policy must not change: a wrong record of the cells would cost live ones."""
    view: npt.NDArray[ScalarT] = array.view()
    view.setflags(write=False)
    return view


class EvictionPolicy:
    """Base of all policies: say how much each cell is worth, the cheapest blocks go first.

    Attributes:
        by_segments: whole sentences go instead of blocks.
        heeds_questions: it looks at ``CellView.attention``, for which questions have to be read as they come.
    """

    by_segments: ClassVar[bool] = False
    heeds_questions: ClassVar[bool] = False

    def score(self, view: CellView) -> FloatArray:
        """Worth of each cell, shape [n_cells]; the lowest goes first. Free and protected cells are ignored."""
        raise NotImplementedError

    def choose(self, view: CellView, n_cells: int) -> IntArray:
        """Cells to evict: whole blocks of neighbours, so that whole pages become free, or whole segments, until
        ``n_cells`` are found.

        Returns fewer when fewer may go.
        """
        candidates = np.flatnonzero(view.evictable)
        if n_cells <= 0 or not candidates.size:
            return np.empty(0, dtype=np.int32)
        score = self.score(view)
        block = (view.segments if self.by_segments else view.blocks)[candidates]
        counts = np.bincount(block)
        ids = np.flatnonzero(counts)
        worth = np.bincount(block, weights=score[candidates])[ids] / counts[ids]
        ranked = ids[np.argsort(worth, kind="stable")]
        enough = int(np.searchsorted(np.cumsum(counts[ranked]), n_cells)) + 1
        if self.by_segments:  # somewhat more than needed, of which those go that lie together
            spare = min(n_cells // _SPARE_PART, (len(candidates) - n_cells) // 2)
            enough = int(np.searchsorted(np.cumsum(counts[ranked]), n_cells + spare)) + 1
        goes = np.zeros(len(counts), dtype=np.bool_)
        goes[ranked[:enough]] = True
        chosen = goes[block]
        if self.by_segments:
            chosen = _longest_runs(candidates, block, chosen, n_cells)
        return candidates[chosen].astype(np.int32)


def _longest_runs(cells: IntArray64, block: IntArray, chosen: BoolArray, n_cells: int) -> BoolArray:
    """Of the chosen ones those that lie next to most others, until there are enough, so that whole pages become free.

    Args:
        cells: ascending; shape [n].
        block: the number of the block or segment of each; shape [n].
        chosen: which of them might go; shape [n].
        n_cells: how many are to go at least.
    """
    at = np.flatnonzero(chosen)
    run = np.cumsum(np.concatenate([[0], np.diff(cells[at]) != 1]))
    length = np.bincount(run)[run]
    # by runs, the longest first, and in a run one block after the other
    taken = at[np.lexsort((at, run, -length))][:n_cells]
    goes = np.zeros(len(chosen), dtype=np.bool_)
    goes[taken] = True
    goes |= chosen & (block == block[taken[-1]])
    return goes
