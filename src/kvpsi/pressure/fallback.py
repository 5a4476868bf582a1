"""Readings without /proc (macOS, Windows, a sandbox that hides it), and the choice of a source."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil

from kvpsi.errors import PressureUnavailableError
from kvpsi.pressure.base import PressureSource
from kvpsi.pressure.rates import CounterRate, Slope
from kvpsi.pressure.reading import Headroom, Reading, Stall, Swap
from kvpsi.pressure.source import LinuxSource
from kvpsi.pressure.synthetic import SYNTHETIC_SCOPE, SyntheticStall

_SYNTHETIC_PROBLEM = (
    "There is no Pressure Stall Information here: the memory stall is estimated from headroom and swapping."
)


class PsutilSource:
    """Headroom and swap from psutil, and a synthetic memory stall (see synthetic.py for the formula).

    CPU and I/O stalls stay 0. ``working_set_file_bytes`` is taken off what psutil calls available, which
    counts mapped files as free. Raises PressureUnavailableError when psutil cannot read the memory either.
    """

    def __init__(self, *, working_set_file_bytes: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._working_set_file_bytes = max(0, working_set_file_bytes)
        self._clock = clock
        self._slope = Slope()
        self._swap_in, self._swap_out = CounterRate(), CounterRate()
        self._stall = SyntheticStall()
        self._time_s: float | None = None
        self._has_swap = _swap_works()
        self._last_memory = (0, 0)
        try:
            self._last_memory = _virtual_memory()
        except Exception as error:
            raise PressureUnavailableError(f"psutil cannot read this machine's memory either ({error}).") from error

    @property
    def working_set_file_bytes(self) -> int:
        """Bytes of files (the weights) that must stay in memory and so do not count as available."""
        return self._working_set_file_bytes

    @working_set_file_bytes.setter
    def working_set_file_bytes(self, value: int) -> None:
        self._working_set_file_bytes = max(0, value)
        self._slope.reset()

    def read(self) -> Reading:
        now_s = self._clock()
        interval_s = 0.0 if self._time_s is None else max(0.0, now_s - self._time_s)
        self._time_s = now_s
        problems = [_SYNTHETIC_PROBLEM]
        try:
            self._last_memory = _virtual_memory()
        except Exception as error:  # psutil lets whatever its platform code meets through
            problems.append(f"The memory cannot be read, the last known figure is repeated: {error}.")
        headroom = self._headroom(now_s)
        swap = self._swap(now_s, problems)
        return Reading(
            time_s=now_s,
            interval_s=interval_s,
            headroom=headroom,
            memory=self._stall.measure(headroom, swap.swap_in_bytes_s, interval_s),
            cpu=Stall(scope=SYNTHETIC_SCOPE),
            io=Stall(scope=SYNTHETIC_SCOPE),
            swap=swap,
            headrooms=(headroom,),
            synthetic=True,
            problems=tuple(problems),
        )

    def close(self) -> None:
        """Nothing is held open."""

    def describe(self) -> list[str]:
        headroom = self.read().headroom
        return [
            _SYNTHETIC_PROBLEM,
            f"Memory: {headroom.available_bytes >> 20} MiB of {headroom.limit_bytes >> 20} MiB are left.",
            "Swap can be read." if self._has_swap else "Swap cannot be read.",
        ]

    def _headroom(self, now_s: float) -> Headroom:
        total_bytes, present_bytes = self._last_memory
        available_bytes = present_bytes - self._working_set_file_bytes
        return Headroom(
            available_bytes=available_bytes,
            slope_bytes_s=self._slope.update(now_s, available_bytes),
            limit_bytes=total_bytes,
            usage_bytes=total_bytes - present_bytes,
            reclaimable_bytes=-self._working_set_file_bytes,
            scope=SYNTHETIC_SCOPE,
        )

    def _swap(self, now_s: float, problems: list[str]) -> Swap:
        if not self._has_swap:
            return Swap(scope=SYNTHETIC_SCOPE)
        try:
            swap = psutil.swap_memory()
        except Exception as error:
            problems.append(f"Swap cannot be read: {error}.")
            return Swap(scope=SYNTHETIC_SCOPE)
        return Swap(
            total_bytes=swap.total,
            used_bytes=swap.used,
            swap_in_bytes_s=self._swap_in.update(now_s, swap.sin),
            swap_out_bytes_s=self._swap_out.update(now_s, swap.sout),
            scope=SYNTHETIC_SCOPE,
        )


def _virtual_memory() -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def _swap_works() -> bool:
    """psutil warns, at every call, where the swap counters are hidden; then they are not asked for again."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            psutil.swap_memory()
        except Exception:
            return False
    return True


def open_source(
    root: Path = Path("/"),
    *,
    pid: int | Literal["self"] = "self",
    working_set_file_bytes: int = 0,
    clock: Callable[[], float] = time.monotonic,
) -> PressureSource:
    """The best source that works here: the kernel's own files, else psutil.

    Raises PressureUnavailableError when neither can read how much memory there is, and nothing else.
    """
    try:
        return LinuxSource(root, pid=pid, working_set_file_bytes=working_set_file_bytes, clock=clock)
    except PressureUnavailableError as no_linux:
        try:
            return PsutilSource(working_set_file_bytes=working_set_file_bytes, clock=clock)
        except PressureUnavailableError as no_psutil:
            raise PressureUnavailableError(f"{no_linux} {no_psutil}") from None
