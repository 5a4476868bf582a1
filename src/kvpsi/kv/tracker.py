"""One KV cache of a context: which cells are in use, which pages they keep committed, and giving those back."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvpsi.kv import pages
from kvpsi.kv.cells import CellMirror, Placement
from kvpsi.kv.keys import rows_of
from kvpsi.kv.layout import Section
from kvpsi.kv.spans import free_bytes, whole_pages_in
from kvpsi.kv.statedata import SectionState
from kvpsi.kv.ubatch import Index, Tokens

Micro = Sequence[Sequence[Index]]
"""Micro-batches, each a list of groups (one, or one for each stream), each the indexes of its tokens."""

KeyRows = npt.NDArray[np.uint8]
"""Layer 0's K rows of some cells, shape [cells, bytes of a row]."""


@dataclass(frozen=True, slots=True)
class Release:
    """What giving pages back really did.

    ``requested_bytes`` lie in free cells that were in use since the last release; ``returned_bytes`` were present in
    memory before (mincore) and are not any more.
    """

    requested_bytes: int
    returned_bytes: int
    seconds: float

    def __add__(self, other: Release) -> Release:
        return Release(
            self.requested_bytes + other.requested_bytes,
            self.returned_bytes + other.returned_bytes,
            self.seconds + other.seconds,
        )


NOTHING = Release(0, 0, 0.0)


class SectionTracker:
    """Mirror, committed cells and pages of one `Section`."""

    def __init__(self, section: Section, n_seq: int) -> None:
        self.section = section
        self.mirror = CellMirror(section.n_cells, section.n_stream, n_seq, n_swa=section.n_swa)
        # llama.cpp wrote zeros over everything, so all of it is committed to begin with
        self.touched = [np.ones(section.n_cells, dtype=np.bool_) for _ in range(section.n_stream)]
        inner = pages.whole_pages(section.extent.start, section.extent.end)
        self._keys = [rows_of(planes[0], section.n_cells) for planes in section.planes]
        self.inner = inner if inner is not None else pages.Mapping(section.extent.start, section.extent.start)
        pages.forbid_huge_pages(self.inner)
        pages.set_apart(self.inner)

    # -- predicting ----------------------------------------------------------------------------------------------

    def plan(self, tokens: Tokens, micro: Micro) -> list[list[Placement]] | None:
        """Where each group of each micro-batch will go, or None if llama.cpp will not find room."""
        mirror = self.mirror if len(micro) == 1 else copy.deepcopy(self.mirror)
        plan = []
        for groups in micro:
            placements = []
            # unified cells are searched once for the whole micro-batch, streams once for each group
            for index in groups if mirror.n_stream > 1 else [np.concatenate(groups)]:
                if not len(index):
                    continue
                stream = 0 if mirror.n_stream == 1 else tokens.seqs[index[0]][0]
                cells = mirror.streams[stream].find(len(index))
                if cells is None:
                    return None
                placements.append(Placement(stream, cells, index))
            if mirror is not self.mirror:
                self._place(mirror, tokens, placements)
            plan.append(placements)
        return plan

    def free_ahead(self, seq_id: int, most: int) -> Placement:
        """The cells that single tokens will take one after the other, at most so many; none if it takes a search."""
        stream = 0 if self.mirror.n_stream == 1 else seq_id
        cells = self.mirror.streams[stream].free_ahead(most)
        return Placement(stream, cells, np.arange(len(cells)))

    @staticmethod
    def _place(mirror: CellMirror, tokens: Tokens, placements: Sequence[Placement]) -> None:
        for p in placements:
            seqs = [tokens.seqs[i] for i in p.index.tolist()]
            mirror.streams[p.stream].place(p.cells, tokens.pos[p.index], seqs, tokens.token[p.index])

    def commit(self, tokens: Tokens, placements: Sequence[Placement]) -> None:
        """Record that a micro-batch went where it was predicted to go."""
        self._place(self.mirror, tokens, placements)
        self.touch(placements)

    def touch(self, placements: Sequence[Placement]) -> None:
        """Record that cells were written to."""
        for p in placements:
            self.touched[p.stream][p.cells] = True

    def touch_all(self) -> None:
        """Record that llama.cpp may have written to every cell."""
        for touched in self.touched:
            touched[:] = True

    # -- verifying -----------------------------------------------------------------------------------------------

    def key_rows(self, plan: Sequence[Sequence[Placement]]) -> KeyRows:
        """A copy of layer 0's K rows of the planned cells as they are now."""
        rows = [self._keys[p.stream][p.cells] for placements in plan for p in placements]
        return np.concatenate(rows) if rows else self._keys[0][:0]

    def all_written(self, tokens: Tokens, plan: Sequence[Sequence[Placement]], before: KeyRows) -> bool:
        """Whether every planned cell's row changed, unless it may have held the very same bytes already.

        It may where its last position and token were the same, or are not known (a restored state).

        Call it after the decode and before `commit`.
        """
        unchanged = (self.key_rows(plan) == before).all(axis=1)
        if not unchanged.any():
            return True
        at = 0
        for placements in plan:
            for p in placements:
                held = self.mirror.streams[p.stream]
                mine = unchanged[at : at + len(p.cells)]
                at += len(p.cells)
                index = p.index[mine]
                if not held.may_hold_already(p.cells[mine], tokens.pos[index], tokens.token[index]).all():
                    return False
        return True

    def all_loaded(self, plan: Sequence[Sequence[Placement]], saved: SectionState) -> bool:
        """Whether the planned cells hold layer 0's K rows of a saved state, in its order."""
        if not saved.keys:
            return True
        return np.array_equal(self.key_rows(plan).reshape(-1), np.frombuffer(saved.keys[0].data, dtype=np.uint8))

    # -- giving back ---------------------------------------------------------------------------------------------

    def slack_cells(self) -> int:
        """Free cells that may still hold pages."""
        return sum(int((t & s.free()).sum()) for t, s in zip(self.touched, self.mirror.streams, strict=True))

    def release_slack(self) -> Release:
        """Give back the pages of all free cells written to since the last time.

        Raises:
            OSError: the kernel refused; see `kvpsi.kv.pages.release`.
        """
        started = time.perf_counter()
        free = [cells.free() for cells in self.mirror.streams]
        slack = [touched & mask for touched, mask in zip(self.touched, free, strict=True)]
        requested = sum(int(mask.sum()) for mask in slack) * self.section.bytes_per_cell
        found = map(free_bytes, self.section.planes, free, slack) if requested else ()
        spans = whole_pages_in(found)
        returned = pages.present_bytes(spans)
        pages.release(spans)
        for touched, cells in zip(self.touched, self.mirror.streams, strict=True):
            touched[cells.free()] = False
        return Release(requested, returned, time.perf_counter() - started)
