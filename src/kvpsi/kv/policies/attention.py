"""Keep the sentences that the pending question attends to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from kvpsi.kv.cells import IntArray
from kvpsi.kv.policies.base import CellView, EvictionPolicy, FloatArray


@dataclass(frozen=True, slots=True)
class Attention(EvictionPolicy):
    """Whole segments by the attention that the question's last tokens pay to them; without a question the oldest go.

    Args:
        recent_share: of what may be kept, the share that goes to the most recent tokens whatever they say.
    """

    recent_share: float = 0.5
    by_segments: ClassVar[bool] = True
    heeds_questions: ClassVar[bool] = True

    def score(self, view: CellView) -> FloatArray:
        """The less attended to, the cheaper; what is not known to be attended to is cheaper still, by age."""
        if view.attention is None:
            return view.pos.astype(np.float64)
        unknown = view.pos.astype(np.float64) - float(view.pos.max()) - 1.0
        return np.where(np.isnan(view.attention), unknown, view.attention)

    def choose(self, view: CellView, n_cells: int) -> IntArray:
        """As the base does, without the most recent ones."""
        if view.attention is None:
            return EvictionPolicy.choose(self, view, n_cells)
        candidates = np.flatnonzero(view.evictable)
        n_recent = int(self.recent_share * max(0, len(candidates) - n_cells))
        recent = candidates[np.argsort(view.pos[candidates], kind="stable")[len(candidates) - n_recent :]]
        protected = view.protected.copy()
        protected[recent] = True
        return EvictionPolicy.choose(self, replace(view, protected=protected), n_cells)
