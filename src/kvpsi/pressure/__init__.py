"""Sense: the kernel's pressure files, memory cgroups and headroom, as one Reading per tick.

``open_source()`` gives the best source that works on this machine, ``Monitor`` reads it in a thread.
"""

from kvpsi.pressure.base import PressureSource
from kvpsi.pressure.fake import ManualClock, ScriptedSource, make_reading
from kvpsi.pressure.fallback import PsutilSource, open_source
from kvpsi.pressure.interval import MonitorSettings, next_interval_s
from kvpsi.pressure.monitor import Listener, Monitor
from kvpsi.pressure.reading import Headroom, Reading, Resource, ScopeName, Stall, StallLine, Swap
from kvpsi.pressure.source import LinuxSource
from kvpsi.pressure.trigger import Trigger, TriggerSpec, open_best_trigger, open_trigger, open_trigger_from_environment

__all__ = [
    "Headroom",
    "LinuxSource",
    "Listener",
    "ManualClock",
    "Monitor",
    "MonitorSettings",
    "PressureSource",
    "PsutilSource",
    "Reading",
    "Resource",
    "ScopeName",
    "ScriptedSource",
    "Stall",
    "StallLine",
    "Swap",
    "Trigger",
    "TriggerSpec",
    "make_reading",
    "next_interval_s",
    "open_best_trigger",
    "open_source",
    "open_trigger",
    "open_trigger_from_environment",
]
