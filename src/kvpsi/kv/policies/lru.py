"""Forget the sequence that was not decoded for longest, and of it the oldest tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvpsi.kv.policies.base import CellView, EvictionPolicy, FloatArray


@dataclass(frozen=True, slots=True)
class LeastRecentlyUsed(EvictionPolicy):
    """Across sequences by their last use, within one as `Streaming`; a cell that several share counts as the latest."""

    def score(self, view: CellView) -> FloatArray:
        """The longer unused, the cheaper; then the older."""
        rank = np.searchsorted(np.unique(view.used_at), view.used_at) + 1
        latest: FloatArray = (view.owner * rank).max(axis=1).astype(np.float64)
        return latest * (int(view.pos.max()) + 1) + view.pos
