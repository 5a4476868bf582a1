"""The turns of a conversation that must stay: what the model was told to be, and what it is being asked."""

from __future__ import annotations

import numpy as np

from kvpsi.kv.cells import BoolArray


def that_must_stay(ends_turn: BoolArray, most_tokens: int) -> BoolArray:
    """Which tokens of a sequence belong to its first turn, or to the last one that has ended.

    Of the first turn those at its beginning, of the last one those at its end, ``most_tokens`` of each. A single turn
    is the last one; none has ended in a text that is no conversation.

    Args:
        ends_turn: which of its tokens end a turn, in the order of their positions; shape [tokens].
        most_tokens: of each of the two.
    """
    stay = np.zeros(len(ends_turn), dtype=np.bool_)
    ends = np.flatnonzero(ends_turn) + 1
    if ends.size > 1:
        stay[: min(ends[0], most_tokens)] = True
    if ends.size:
        begins = ends[-2] if ends.size > 1 else 0
        stay[max(begins, ends[-1] - most_tokens) : ends[-1]] = True
    return stay
