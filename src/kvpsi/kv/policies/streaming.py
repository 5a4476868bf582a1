"""Forget the oldest; the first tokens (attention sinks) and the most recent ones stay with every policy."""

from __future__ import annotations

from dataclasses import dataclass

from kvpsi.kv.policies.base import CellView, EvictionPolicy, FloatArray


@dataclass(frozen=True, slots=True)
class Streaming(EvictionPolicy):
    """StreamingLLM (Xiao et al., 2023, https://arxiv.org/abs/2309.17453), with position gaps left open."""

    def score(self, view: CellView) -> FloatArray:
        """The older, the cheaper."""
        return view.pos.astype("float64")
