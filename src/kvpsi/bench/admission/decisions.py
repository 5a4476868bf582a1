"""What one decision costs, with few and with many who wait."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from kvpsi.admission import Admission, Load, Places, TooLateError
from kvpsi.admission.policies import Adaptive

LEVELS = (1, 10, 100, 1000, 10_000)
_ROUNDS = 7
_DECISIONS = 2000


@dataclass(eq=False, slots=True)
class _Asked:
    urgency: int
    flow: str
    begin_by_s: float
    arrived_s: float = 0.0
    wanted_by_s: float = math.inf
    n_prompt: int = 60
    max_tokens: int = 64
    name: int = field(default=0)

    @property
    def fingerprint(self) -> Hashable:
        return self.name


def measure(seed: int, levels: Sequence[int] = LEVELS) -> dict[int, float]:
    """Microseconds to let one in, turn another one away until later, look who is next, and take that one out, with so
    many in the queue: medians."""
    found: dict[int, list[float]] = {level: [] for level in levels}
    queues = {level: _queue(level, seed) for level in levels}
    rng = random.Random(seed)
    for number in range(_ROUNDS):
        for level in levels if number % 2 == 0 else levels[::-1]:
            admission = queues[level]
            asked = [_asked(rng) for _ in range(_DECISIONS)]
            hurried = [_asked(rng, wait_s=1.0) for _ in range(_DECISIONS)]
            began = time.perf_counter()
            for each, other in zip(asked, hurried, strict=True):
                admission.offer(each)
                with contextlib.suppress(TooLateError):
                    admission.offer(other)
                admission.limit()
                admission.overdue()
                admission.take(admission.first_ones(1)[0])
            found[level].append((time.perf_counter() - began) / _DECISIONS * 1e6)
    return {level: statistics.median(values) for level, values in found.items()}


def _queue(n_waiting: int, seed: int) -> Admission[_Asked]:
    rng = random.Random(seed)
    admission: Admission[_Asked] = Admission(
        2 * n_waiting + 16,
        Adaptive(),
        time.monotonic,
        lambda: Places(8, 8, 1.0),
        lambda: Load(time.monotonic(), 8, 8, 8, n_waiting, 1.0, 0.02, 0.001),
    )
    admission.costs.note_answers(100, 0.05)
    for _ in range(n_waiting):
        admission.offer(_asked(rng))
    return admission


def _asked(rng: random.Random, wait_s: float = math.inf) -> _Asked:
    now_s = time.monotonic()
    begin_by_s = now_s + rng.uniform(1e6, 2e6)
    return _Asked(rng.randrange(8), str(rng.randrange(50)), begin_by_s, now_s, now_s + wait_s, name=rng.getrandbits(60))
