"""Which situations are played: drawn from a seed, every combination in turn, sizes and rates at random."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvpsi.board.board import SwapKind
from kvpsi.hog import HogSettings
from kvpsi.hog.shape import ShapeName

MIB = 1 << 20
_RATES_MIB_S = (20.0, 400.0)
_SHARES = (0.75, 0.95)  # of what fits beside the models at their floor
_SHAPES: tuple[ShapeName, ...] = ("grow", "pulse", "sawtooth")
_SWAPS: tuple[SwapKind, ...] = ("none", "zram")
_HOLD_S = 3.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """One situation.

    Attributes:
        number: its place in the list.
        swap: of the board.
        n_models: models at once.
        full: whether their caches are nearly full at the beginning, else nearly empty.
        hog: the neighbour.
    """

    number: int
    swap: SwapKind
    n_models: int
    full: bool
    hog: HogSettings


def draw(
    count: int,
    seed: int,
    room_bytes: Mapping[int, int],
    swaps: Sequence[SwapKind] = _SWAPS,
    shares: tuple[float, float] = _SHARES,
) -> list[Scenario]:
    """``count`` scenarios.

    Args:
        count: how many.
        seed: the same seed draws the same list, as far as the room is the same.
        room_bytes: what a neighbour may take beside so many models at their floor.
        swaps: of the boards.
        shares: of that room, the least and the most that a neighbour takes.
    """
    rng = random.Random(seed)
    combinations = list(itertools.product(swaps, room_bytes, (True, False), _SHAPES))
    rng.shuffle(combinations)
    scenarios = []
    for number, (swap, n_models, full, shape) in enumerate(itertools.islice(itertools.cycle(combinations), count)):
        rate = math.exp(rng.uniform(*map(math.log, _RATES_MIB_S))) * MIB
        size = int(rng.uniform(*shares) * room_bytes[n_models]) // (2 * MIB) * 2 * MIB
        growing_share = 0.5 if shape == "pulse" else 1.0  # of a period
        period_s = max(1.0, size / rate / growing_share)
        hog = HogSettings(size, rate_bytes_s=rate, hold_s=_HOLD_S, shape=shape, period_s=period_s)
        scenarios.append(Scenario(number, swap, n_models, full, hog))
    return scenarios
