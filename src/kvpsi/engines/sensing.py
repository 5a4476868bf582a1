"""Where a governed model's readings come from."""

from __future__ import annotations

from kvpsi.pressure import LinuxSource, PressureSource, Trigger, open_best_trigger, open_source


def best_sensing(weights_bytes: int) -> tuple[PressureSource, Trigger | None]:
    """This machine's kernel, and the best trigger that there is.

    Args:
        weights_bytes: of the model's file; they do not count as memory that could be had.
    """
    readings = open_source(working_set_file_bytes=weights_bytes)
    own = readings.cgroups.pressure if isinstance(readings, LinuxSource) else None
    return readings, open_best_trigger(own.path if own else None)[0]
