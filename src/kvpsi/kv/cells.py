"""A mirror of llama.cpp's cell allocation, so that it is known exactly which cells are free.

llama.cpp does not tell which cell a token went to. Its rule is simple and deterministic, though
(`llama_kv_cache::find_slot` and `apply_ubatch`), so it is replayed here on the same requests. Predictions are
checked against memory once they were decoded (see `kvpsi.kv.elastic`); a mirror that was ever wrong is not trusted
again until the cache has been cleared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

EMPTY = -1
UNKNOWN_TOKEN = -2
UNKNOWN_POS = -2
_MAX_POS = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one micro-batch goes: ``cells[i]`` of ``stream`` takes token ``index[i]`` of the batch."""

    stream: int
    cells: IntArray
    index: npt.NDArray[np.intp]


class StreamCells:
    """The cells of one stream of one cache.

    ``pos[i]`` is the position held by cell i or ``EMPTY``; ``owner[i, s]`` tells whether sequence s sees it.
    ``token[i]`` is the token whose K and V the cell's bytes hold, also after the cell was freed, or
    ``UNKNOWN_TOKEN``; together with ``held_pos[i]``, its position or ``UNKNOWN_POS``, it tells whether a rewrite has to
    change the bytes.
    """

    def __init__(self, n_cells: int, n_seq: int, *, n_swa: int = 0) -> None:
        self.n_cells = n_cells
        self.n_swa = n_swa
        self.pos: IntArray = np.full(n_cells, EMPTY, dtype=np.int32)
        self.owner: BoolArray = np.zeros((n_cells, n_seq), dtype=np.bool_)
        self.token: IntArray = np.full(n_cells, UNKNOWN_TOKEN, dtype=np.int32)
        self.held_pos: IntArray = np.full(n_cells, EMPTY, dtype=np.int32)
        self.head = 0
        self.used = 0

    # -- what is there -------------------------------------------------------------------------------------------

    def free(self) -> BoolArray:
        """Mask of the cells that hold no token, shape [n_cells]."""
        free: BoolArray = self.pos == EMPTY
        return free

    def cells_of(self, seq_id: int) -> IntArray:
        """Cells that sequence ``seq_id`` sees, ascending."""
        return np.flatnonzero(self.owner[:, seq_id]).astype(np.int32)

    def pos_max(self, seq_id: int) -> int:
        """Largest position of the sequence, -1 if it has none."""
        held = self.pos[self.owner[:, seq_id]]
        return int(held.max()) if held.size else -1

    def pos_min(self, seq_id: int) -> int:
        """Smallest position of the sequence, -1 if it has none."""
        held = self.pos[self.owner[:, seq_id]]
        return int(held.min()) if held.size else -1

    # -- placing tokens ------------------------------------------------------------------------------------------

    def find(self, n_tokens: int) -> IntArray | None:
        """The cells that llama.cpp would choose for ``n_tokens`` tokens, or None if there are not enough."""
        head = self.head
        if head > self.used + 2 * n_tokens:
            head = 0
        if n_tokens == 1 and head < self.n_cells and self.pos[head] == EMPTY:
            return np.array([head], dtype=np.int32)
        if n_tokens > self.n_cells:
            return None
        usable = self.free() | self._outside_window() if self.n_swa else self.free()
        ahead = np.flatnonzero(usable[head:]) + head
        chosen = ahead[:n_tokens]
        if chosen.size < n_tokens:
            chosen = np.concatenate([chosen, np.flatnonzero(usable[:head])[: n_tokens - chosen.size]])
        return chosen.astype(np.int32) if chosen.size == n_tokens else None

    def free_ahead(self, most: int) -> IntArray:
        """The cells, at most so many, that `find` would give to single tokens without searching."""
        if self.head > self.used + 2:
            return np.empty(0, dtype=np.int32)
        ahead = self.pos[self.head : self.head + most] == EMPTY
        n = len(ahead) if ahead.all() else int(ahead.argmin())
        return np.arange(self.head, self.head + n, dtype=np.int32)

    def _outside_window(self) -> BoolArray:
        """Cells of exactly one sequence that its sliding window has left behind: they may be overwritten."""
        mask = np.zeros(self.n_cells, dtype=np.bool_)
        single = self.owner.sum(axis=1) == 1
        for seq_id in np.flatnonzero(self.owner.any(axis=0)):
            mine = single & self.owner[:, seq_id]
            mask |= mine & (self.pos_max(int(seq_id)) + 1 - self.pos >= self.n_swa)
        return mask

    def place(self, cells: IntArray, pos: IntArray, seqs: Sequence[Sequence[int]], tokens: IntArray) -> None:
        """Fill ``cells`` with tokens at ``pos``; overwritten cells purge older positions of their sequence."""
        overwritten: dict[int, int] = {}
        if self.n_swa:
            taken = cells[self.pos[cells] != EMPTY]
            for cell in taken:
                owner = int(np.flatnonzero(self.owner[cell])[0])
                overwritten[owner] = max(overwritten.get(owner, -1), int(self.pos[cell]))
            self._clear_cells(taken)
        self.pos[cells] = pos
        self.held_pos[cells] = pos
        self.token[cells] = tokens
        if all(len(s) == 1 for s in seqs):
            self.owner[cells, np.fromiter((s[0] for s in seqs), dtype=np.intp, count=len(seqs))] = True
        else:
            for cell, owners in zip(cells, seqs, strict=True):
                self.owner[cell, list(owners)] = True
        self.used += len(cells)
        for seq_id, last in overwritten.items():
            first = self.pos_min(seq_id)
            if 0 <= first <= last:
                self.seq_rm(seq_id, first, last + 1)
        self.head = int(cells[-1]) + 1

    # -- taking tokens out ---------------------------------------------------------------------------------------

    def _clear_cells(self, cells: IntArray) -> None:
        self.pos[cells] = EMPTY
        self.owner[cells] = False
        self.used -= len(cells)

    def _freed(self, cells: IntArray) -> IntArray:
        """Account for ``cells`` that lost their last owner: a hole before the head moves the head back."""
        if cells.size:
            self._clear_cells(cells)
            self.head = min(self.head, int(cells[0]))
        return cells

    def in_range(self, p0: int, p1: int) -> BoolArray:
        """Mask of the used cells with p0 <= position < p1; a negative bound is open."""
        low = max(p0, 0)
        high = _MAX_POS if p1 < 0 else p1
        return (self.pos >= low) & (self.pos < high)

    def seq_rm(self, seq_id: int, p0: int, p1: int) -> IntArray:
        """Take positions [p0, p1) from a sequence (-1: from all); returns the cells that became free."""
        mask = self.in_range(p0, p1)
        if seq_id < 0:
            return self._freed(np.flatnonzero(mask).astype(np.int32))
        mask &= self.owner[:, seq_id]
        cells = np.flatnonzero(mask)
        self.owner[cells, seq_id] = False
        orphans = cells[~self.owner[cells].any(axis=1)]
        return self._freed(orphans.astype(np.int32))

    def seq_keep(self, seq_id: int) -> IntArray:
        """Keep only one sequence; returns the cells that became free."""
        mine = self.owner[:, seq_id].copy()
        gone = np.flatnonzero((self.pos != EMPTY) & ~mine).astype(np.int32)
        self.owner[:] = False
        self.owner[:, seq_id] = mine
        return self._freed(gone)

    def seq_share(self, src: int, dst: int, p0: int, p1: int) -> None:
        """Let sequence ``dst`` see what ``src`` sees in [p0, p1) (same stream: no bytes are copied)."""
        if src != dst:
            self.owner[self.in_range(p0, p1) & self.owner[:, src], dst] = True

    def seq_add(self, seq_id: int, p0: int, p1: int, shift: int) -> IntArray:
        """Move positions [p0, p1) of a sequence by ``shift``; returns the cells that fell below zero.

        llama.cpp rotates the keys at the next decode, in all cells, so no byte is predictable afterwards.
        """
        if shift == 0 or max(p0, 0) == p1:
            return np.empty(0, dtype=np.int32)
        moved = np.flatnonzero(self.in_range(p0, p1) & self.owner[:, seq_id])
        self.pos[moved] += shift
        gone = moved[self.pos[moved] < 0].astype(np.int32)
        if gone.size:
            self._clear_cells(gone)
        self.head = int(gone[0]) if gone.size else 0
        self.token[:] = UNKNOWN_TOKEN
        return gone

    def seq_div(self, seq_id: int, p0: int, p1: int, divisor: int) -> None:
        """Divide positions [p0, p1) of a sequence; the head stays."""
        if divisor == 1 or max(p0, 0) == p1:
            return
        moved = np.flatnonzero(self.in_range(p0, p1) & self.owner[:, seq_id])
        self.pos[moved] //= divisor
        self.token[:] = UNKNOWN_TOKEN

    def copy_from(self, other: StreamCells, src: int, dst: int) -> None:
        """Become a copy of what sequence ``src`` holds in another stream (the bytes follow at the next decode)."""
        mine = other.owner[:, src]
        self.pos[:] = np.where(mine, other.pos, EMPTY)
        self.owner[:] = False
        self.owner[:, dst] = mine
        self.token[:] = other.token
        self.held_pos[:] = other.held_pos
        self.used = int(mine.sum())
        self.head = other.head

    def may_hold_already(self, cells: IntArray, pos: IntArray, tokens: IntArray) -> BoolArray:
        """For each cell, whether its bytes may be those of this token at this position without being written."""
        token, held_pos = self.token[cells], self.held_pos[cells]
        same: BoolArray = ((token == UNKNOWN_TOKEN) | (token == tokens)) & (
            (held_pos == UNKNOWN_POS) | (held_pos == pos)
        )
        return same

    def forget_bytes(self) -> None:
        """Any cell's bytes may be anything: somebody else wrote here."""
        self.token[:] = UNKNOWN_TOKEN
        self.held_pos[:] = UNKNOWN_POS

    def clear(self) -> None:
        """Forget everything but what the bytes are."""
        self.pos[:] = EMPTY
        self.owner[:] = False
        self.head = 0
        self.used = 0


class CellMirror:
    """All streams of one KV cache.

    ``n_stream`` is 1 for unified cells, else the number of sequences, each of which has its own stream.
    """

    def __init__(self, n_cells: int, n_stream: int, n_seq: int, *, n_swa: int = 0) -> None:
        self.n_cells = n_cells
        self.n_stream = n_stream
        self.n_seq = n_seq
        self.streams = [StreamCells(n_cells, n_seq, n_swa=n_swa) for _ in range(n_stream)]

    def stream_of(self, seq_id: int) -> StreamCells:
        """The stream that holds a sequence."""
        return self.streams[0 if self.n_stream == 1 else seq_id]

    @property
    def used(self) -> int:
        """Cells that hold a token, over all streams."""
        return self.streams[0].used if self.n_stream == 1 else sum(s.used for s in self.streams)

    @property
    def last_pos(self) -> int:
        """Largest position held in any stream, -1 if none is."""
        return max(int(s.pos.max()) for s in self.streams)

    def clear(self) -> None:
        """Forget everything but what the bytes are."""
        for stream in self.streams:
            stream.clear()

    def forget_bytes(self) -> None:
        """Any cell's bytes may be anything."""
        for stream in self.streams:
            stream.forget_bytes()
