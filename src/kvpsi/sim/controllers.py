"""Who decides how much a simulated cache may hold: kvpsi's own law, and what else is there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import simpy

from kvpsi.errors import UsageError
from kvpsi.governor.adapt import AdaptSettings
from kvpsi.governor.governor import Governor
from kvpsi.governor.law import LawSettings
from kvpsi.governor.sharing import Sharing
from kvpsi.pressure.interval import MonitorSettings
from kvpsi.sim.cache import SimCache
from kvpsi.sim.engine import SimEngine
from kvpsi.sim.memory import Events, Memory
from kvpsi.sim.sensing import SimSource


class Controller(ABC):
    """One way to size a cache. ``elastic``: memory is given back, and not all of it taken at the beginning."""

    name: ClassVar[str]
    elastic: ClassVar[bool] = True

    @abstractmethod
    def attach(self, memory: Memory, cache: SimCache, engine: SimEngine) -> None:
        """Begin to control; the model has not begun yet."""


class Static(Controller):
    """All of the cache from the beginning to the end, as llama.cpp does it."""

    name = "static"
    elastic = False

    def attach(self, memory: Memory, cache: SimCache, engine: SimEngine) -> None:
        """Nothing to do."""


class Law(Controller):
    """kvpsi's law, unchanged, run by its governor.

    Args:
        settings: of the law.
        monitor: how often it looks.
        sharing: other governed models of the board; None: there are none.
        adapt: bounds within which it learns; None: it does not.

    Attributes:
        governor: as soon as it runs.
    """

    name = "kvpsi"

    def __init__(
        self,
        settings: LawSettings | None = None,
        monitor: MonitorSettings | None = None,
        sharing: Sharing | None = None,
        adapt: AdaptSettings | None = None,
    ) -> None:
        self.settings = settings or LawSettings()
        self.monitor = monitor or MonitorSettings()
        self.sharing, self.adapt = sharing, adapt
        self.governor: Governor | None = None

    def attach(self, memory: Memory, cache: SimCache, engine: SimEngine) -> None:
        """Look as often as the monitor would."""
        source = SimSource(memory, engine.weights.size_bytes)
        governor = Governor(
            cache, source, settings=self.settings, adapt=self.adapt, monitor=self.monitor, sharing=self.sharing
        )
        self.governor = governor
        memory.env.process(self._watch(memory.env, cache, governor))

    def _watch(self, env: simpy.Environment, cache: SimCache, governor: Governor) -> Events:
        while cache.is_alive:
            yield env.timeout(governor.monitor.tick())
            if governor.monitor.last_error is not None:
                raise governor.monitor.last_error


class Avg10(Controller):
    """A loop on the kernel's average: look at ``avg10`` before each token, and drop a tenth of the tokens while it is
    high; what they took goes back."""

    name = "avg10"

    def __init__(self, threshold: float = 0.10, share: float = 0.10) -> None:
        self._threshold, self._share = threshold, share

    def attach(self, memory: Memory, cache: SimCache, engine: SimEngine) -> None:
        """Look before each token."""

        def look() -> None:
            spare = cache.running.held - cache.settings.keep - cache.settings.tail if cache.running is not None else 0
            if spare >= cache.settings.min_prune and memory.stall.text().some.avg10 >= self._threshold:
                cache.forget(int(self._share * cache.held_tokens))

        engine.before_token = look


class Prune(Avg10):
    """The same as earlier prototypes did it: tokens are dropped, and the process stays as large."""

    name = "prune"
    elastic = False


class HeadroomOnly(Controller):
    """Headroom against a threshold, polled as earlyoom does: a fifth of what is used goes when a tenth is available or
    less. It does not look ahead, knows nothing of PSI, and takes all again above a fifth."""

    name = "headroom"

    def __init__(self, low_share: float = 0.10, high_share: float = 0.20, step_share: float = 0.20) -> None:
        self._low, self._high, self._step = low_share, high_share, step_share

    def attach(self, memory: Memory, cache: SimCache, engine: SimEngine) -> None:
        """Poll."""
        source = SimSource(memory, engine.weights.size_bytes)

        def poll() -> Events:
            limit = cache.status().capacity_bytes
            while cache.is_alive:
                room, status = source.headroom(), cache.status()
                available = room.available_bytes / room.limit_bytes
                if available <= self._low:
                    limit = max(status.floor_bytes, int((1 - self._step) * status.used_bytes))
                elif available >= self._high:
                    limit = status.capacity_bytes
                cache.set_limit(limit, None)
                if status.used_bytes > limit and cache.give_now() is None:
                    cache.interrupt()
                # earlyoom: as long as it would take at 6 GB/s to use up what is there, from 0.1 to 1 s
                yield memory.env.timeout(min(1.0, max(0.1, (room.available_bytes >> 10) / 6000 / 1000)))

        memory.env.process(poll())


class Offload(Controller):
    """A fixed share of the cache stays in memory, the rest lies on disk and is read for every token (FlexGen)."""

    name = "offload"

    def __init__(self, kept_share: float = 0.5) -> None:
        self._kept_share = kept_share

    def attach(self, memory: Memory, cache: SimCache, engine: SimEngine) -> None:
        """What is beyond the share takes no memory, but time."""
        cache.offloaded_share = 1 - self._kept_share

        def stream_s() -> float:
            n_bytes = cache.llm.cache_bytes(cache.held_tokens)
            return cache.offloaded_share * n_bytes / memory.board.read_bytes_s

        engine.extra_s = stream_s


_ALL: tuple[type[Controller], ...] = (Static, Law, Avg10, Prune, HeadroomOnly, Offload)
CONTROLLERS: Mapping[str, type[Controller]] = {each.name: each for each in _ALL}


def controller_named(name: str) -> Controller:
    """A new one.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in CONTROLLERS:
        raise UsageError(f"Controllers are {', '.join(CONTROLLERS)}, not {name!r}.")
    return CONTROLLERS[name]()
