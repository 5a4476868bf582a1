"""Forget blocks by chance: what every other policy has to be better than."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvpsi.kv.policies.base import CellView, EvictionPolicy, FloatArray


@dataclass(frozen=True, slots=True)
class Random(EvictionPolicy):
    """A baseline for comparisons; the same ``seed`` and cells give the same choice."""

    seed: int = 0

    def score(self, view: CellView) -> FloatArray:
        """Any number for each block, from 0 to 1."""
        n_blocks = -(-len(view.pos) // view.block_cells)
        drawn = np.random.default_rng((self.seed, int(view.pos.max()) + 1)).random(n_blocks)
        return np.repeat(drawn, view.block_cells)[: len(view.pos)]
