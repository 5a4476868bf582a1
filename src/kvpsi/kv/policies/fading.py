"""Thin the text out, the older the more, instead of cutting its beginning off."""

from __future__ import annotations

from dataclasses import dataclass

from kvpsi.kv.policies.base import CellView, EvictionPolicy, FloatArray

_PIECE_TOKENS = 48
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class Fading(EvictionPolicy):
    """Something of everything stays: a piece of the text is as likely to stay as it is recent.

    Which pieces go follows from their positions by the golden ratio, which spreads them evenly, so that the same ones
    go in one step as in many.

    Args:
        spread: how much chance counts beside age; 0 is `Streaming`, and the more the nearer it is to `Random`.
    """

    spread: float = 1.0

    def score(self, view: CellView) -> FloatArray:
        """Age and chance, each from 0 to 1."""
        pos = view.pos.astype("float64")
        return pos / max(1.0, float(pos.max())) + self.spread * (pos // _PIECE_TOKENS * _GOLDEN % 1.0)
