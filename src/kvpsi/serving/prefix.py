"""How much of a prompt is there already."""

from __future__ import annotations

from collections.abc import Sequence

_FIRST_LOOK = 16


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two lists share.

    Looks at longer and longer slices and then bisects: they are compared without a loop in Python, and what shares
    little costs little.
    """
    low, step, most = 0, _FIRST_LOOK, min(len(a), len(b))
    while low < most and a[low : low + step] == b[low : low + step]:
        low, step = low + step, 2 * step
    low, high = min(low, most), min(low + step, most)
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
