"""Forget tokens whose keys are like all others, in whole sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvpsi.kv.policies.base import CellView, EvictionPolicy, FloatArray

_MOST_PRODUCTS = 1 << 19  # cells times layers, so that no step is held up for long


@dataclass(frozen=True, slots=True)
class KeyDiff(EvictionPolicy):
    """KeyDiff (Park et al., 2025, https://arxiv.org/abs/2504.15364), its scores averaged over whole segments.

    A key's worth is how little it is like the mean of all keys: minus the cosine, averaged over heads and layers. Where
    there are many cells, fewer layers are looked at.
    """

    by_segments: ClassVar[bool] = True

    def score(self, view: CellView) -> FloatArray:
        """The more alike to the others of its stream, the cheaper; by age where keys cannot be read."""
        if view.keys is None:
            return view.pos.astype(np.float64)
        cells = np.flatnonzero(view.pos >= 0).astype(np.int32)
        worth = np.zeros(len(view.pos))
        layers = np.linspace(0, view.keys.n_layers - 1, _n_layers(view.keys.n_layers, len(cells)))
        for layer in np.unique(layers.round().astype(int)).tolist():
            keys = view.keys.layer(layer, cells)
            keys /= np.linalg.norm(keys, axis=2, keepdims=True) + 1e-12
            mean = keys.mean(axis=0)
            mean /= np.linalg.norm(mean, axis=1, keepdims=True) + 1e-12
            worth[cells] -= np.einsum("chd,hd->c", keys, mean)
        return worth


def _n_layers(n_layers: int, n_cells: int) -> int:
    return max(1, min(n_layers, _MOST_PRODUCTS // max(1, 16 * n_cells)))
