"""Memory of a discrete GPU: how much is free, from NVIDIA's management library.

PSI knows nothing of it: the kernel neither hands out nor takes back a GPU's own memory, so nobody stalls for it.
Whoever asks for more than is free is refused at once. So headroom is all that there is to go by.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from kvpsi.errors import EnvironmentProblem
from kvpsi.pressure.rates import Slope
from kvpsi.pressure.reading import Headroom, Reading, Stall, Swap


class VramSource:
    """A `PressureSource` of one GPU.

    Args:
        device: its number, as ``nvidia-smi`` counts.
        library: NVIDIA's, as the package nvidia-ml-py has it; None: that one.
        clock: seconds.

    Raises:
        EnvironmentProblem: there is no such library, driver or GPU.
    """

    def __init__(self, device: int = 0, library: Any = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml = library if library is not None else _library()
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByIndex(device)
            self._ask()
        except self._nvml.NVMLError as error:
            raise EnvironmentProblem(f"GPU {device} cannot be asked for its memory ({error}).") from error
        self._device, self._clock = device, clock
        self._slope = Slope()
        self._time_s: float | None = None

    def read(self) -> Reading:
        """Sense now; of a GPU that does not answer what it said last, and a problem."""
        now_s = self._clock()
        problems: tuple[str, ...] = ()
        try:
            self._ask()
        except self._nvml.NVMLError as error:
            problems = (f"GPU {self._device} did not tell its memory ({error}).",)
        total, free = self._total, self._free
        slope = 0.0 if problems else self._slope.update(now_s, free)
        room = Headroom(free, slope, total, total - free, 0, f"gpu:{self._device}")
        elapsed_s = 0.0 if self._time_s is None else now_s - self._time_s
        self._time_s = now_s
        return Reading(now_s, elapsed_s, room, Stall(), Stall(), Stall(), Swap(), headrooms=(room,), problems=problems)

    def _ask(self) -> None:
        found = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        self._total, self._free = int(found.total), int(found.free)

    def close(self) -> None:
        """Give the library back."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def describe(self) -> list[str]:
        """What it sees."""
        return [f"Free memory of GPU {self._device}, from NVIDIA's library. Stall of a GPU's memory is unknown."]


def _library() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise EnvironmentProblem(
            "NVIDIA's management library for Python is missing: `pip install kvpsi[gpu]` installs it."
        ) from error
    return pynvml
