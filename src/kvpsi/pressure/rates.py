"""Speeds from samples at irregular times: of counters that only grow, and of levels that go both ways."""

from __future__ import annotations

from collections import deque


class CounterRate:
    """Events per second from a counter; 0 at the first sample and after the counter went backwards."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None
        self._rate = 0.0

    def update(self, now_s: float, count: int) -> float:
        if self._last is None:
            self._last = (now_s, count)
            return 0.0
        elapsed_s = now_s - self._last[0]
        if elapsed_s > 0.0:
            self._rate = max(0, count - self._last[1]) / elapsed_s
            self._last = (now_s, count)
        return self._rate


class Slope:
    """Least-squares slope of a level over the last ``span_s`` seconds.

    Samples older than the span are dropped only while the rest still covers the span. So one tick of a second
    gives the plain difference, and a short tick right after it is damped instead of dividing noise by
    milliseconds.
    """

    def __init__(self, span_s: float = 0.4) -> None:
        self._span_s = span_s
        self._samples: deque[tuple[float, float]] = deque()

    def reset(self) -> None:
        """Forget the past: the level is about to jump for a reason that is no trend."""
        self._samples.clear()

    def update(self, now_s: float, level: float) -> float:
        """Add a sample, return the slope per second; 0 with fewer than two distinct times."""
        samples = self._samples
        if samples and now_s <= samples[-1][0]:
            samples.pop()
        elif len(samples) > 1 and samples[-1][0] - samples[-2][0] < self._span_s / 40:
            # Ticks that come faster than this tell nothing new about a trend and would only cost time.
            samples.pop()
        samples.append((now_s, level))
        while len(samples) > 2 and now_s - samples[1][0] >= self._span_s:
            samples.popleft()
        return _least_squares_slope(samples)


def _least_squares_slope(samples: deque[tuple[float, float]]) -> float:
    # Relative to the newest sample: small products, so no precision is lost to large clocks or sizes.
    time_0, level_0 = samples[-1]
    n = len(samples)
    sum_t = sum_y = sum_tt = sum_ty = 0.0
    for time_s, level in samples:
        t, y = time_s - time_0, level - level_0
        sum_t += t
        sum_y += y
        sum_tt += t * t
        sum_ty += t * y
    spread = n * sum_tt - sum_t * sum_t
    return (n * sum_ty - sum_t * sum_y) / spread if spread > 0.0 else 0.0
