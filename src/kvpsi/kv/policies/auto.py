"""Choose by what is known: the question's own choice while one is pending, else the oldest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvpsi.kv.cells import IntArray
from kvpsi.kv.policies.attention import Attention
from kvpsi.kv.policies.base import CellView, EvictionPolicy, FloatArray
from kvpsi.kv.policies.streaming import Streaming

_WITH_QUESTION = Attention()
_WITHOUT = Streaming()


@dataclass(frozen=True, slots=True)
class Auto(EvictionPolicy):
    """`Attention` while a question is pending, else `Streaming`: what a policy knows about the question decides."""

    heeds_questions: ClassVar[bool] = True

    def score(self, view: CellView) -> FloatArray:
        """As the one that suits."""
        return self._suited(view).score(view)

    def choose(self, view: CellView, n_cells: int) -> IntArray:
        """As the one that suits."""
        return self._suited(view).choose(view, n_cells)

    def _suited(self, view: CellView) -> EvictionPolicy:
        return _WITHOUT if view.attention is None else _WITH_QUESTION
