"""Single tokens of one sequence that follow each other, as text generation makes them.

Where they will go is known when the run is opened, so that a token costs next to nothing beside its decode: all are
checked and recorded together when the run ends, which is before anything else looks at or changes the cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp
import numpy as np

from kvpsi.kv.cells import Placement
from kvpsi.kv.tracker import KeyRows, SectionTracker
from kvpsi.kv.ubatch import Tokens

Plans = list[list[list[Placement]] | None]
"""For each cache: for each micro-batch, where its groups go; None where no room is foreseen."""

_MOST_TOKENS = 64


class Run:
    """Up to ``size`` tokens of sequence ``seq_id``, in cells that lie one after the other in each of the caches.

    ``gate`` is what the cache's limits were when it was opened; ``last_pos`` the largest position that is held.
    """

    def __init__(
        self, trackers: Sequence[SectionTracker], starts: Sequence[Placement], seq_id: int, gate: tuple[int, int]
    ) -> None:
        self.seq_id = seq_id
        self.gate = gate
        self.size = min(len(p.cells) for p in starts)
        self.last_pos = max(t.mirror.last_pos for t in trackers)
        self.used_before = trackers[0].mirror.used
        self.taken: list[tuple[int, int]] = []  # token and position
        self._starts = starts
        self._before = [t.key_rows([[p]]) for t, p in zip(trackers, starts, strict=True)]

    def next(self, batch: llama_cpp.llama_batch) -> tuple[int, int] | None:
        """Token and position of a batch of one that goes on with the run, None if it does not."""
        if len(self.taken) >= self.size:
            return None
        try:
            if batch.n_seq_id[0] != 1 or batch.seq_id[0][0] != self.seq_id:
                return None
            return batch.token[0], batch.pos[0]
        except ValueError:  # a NULL pointer: embeddings, or positions that llama.cpp is to choose
            return None

    def add(self, token: tuple[int, int]) -> None:
        """Note that a token was decoded."""
        self.taken.append(token)
        if token[1] > self.last_pos:
            self.last_pos = token[1]

    def record(self) -> tuple[Tokens, Plans, list[KeyRows]]:
        """The tokens as one batch, where it went in each cache, and what the cells' rows were before."""
        n = len(self.taken)
        token, pos = np.array(self.taken, dtype=np.int32).T
        batch = Tokens(token, pos, [(self.seq_id,)] * n, n)
        plans: Plans = [[[Placement(p.stream, p.cells[:n], np.arange(n))]] for p in self._starts]
        return batch, plans, [rows[:n] for rows in self._before]


def open_run(trackers: Sequence[SectionTracker], seqs: Sequence[int], gate: tuple[int, int], most: int) -> Run | None:
    """A run of at most ``most`` tokens; None where the next cell takes a search to find."""
    if len(seqs) != 1 or most < 1:
        return None
    starts = [t.free_ahead(seqs[0], min(most, _MOST_TOKENS)) for t in trackers]
    if any(not len(p.cells) for p in starts):
        return None
    return Run(trackers, starts, seqs[0], gate)
