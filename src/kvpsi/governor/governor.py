"""The thread that runs the law on a live cache: sense, decide, act, and see what really happened."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from kvpsi.governor.adapt import AdaptSettings, AdaptState, adapt, explain
from kvpsi.governor.law import Decision, LawSettings, State, decide, record_given
from kvpsi.governor.sharing import Sharing
from kvpsi.instrument import Instrument, guarded
from kvpsi.pressure import Monitor, MonitorSettings, PressureSource, Reading, Trigger
from kvpsi.status import CacheStatus


class Governed(Protocol):
    """What a governor needs from a cache. All of `kvpsi.kv` that derive from `GatedCache` have it, a server's memory
    (`kvpsi.serving.memory.CacheMemory`), and the simulated caches (`kvpsi.sim`)."""

    def status(self) -> CacheStatus:
        """Sizes as of now; callable from any thread."""
        ...

    def set_limit(self, limit_bytes: int, chunk_tokens: int | None) -> None:
        """Set the allocation gate and the size of prefill pieces; callable from any thread."""
        ...

    def give_now(self) -> int | None:
        """Shrink to the limit if the engine is idle, and return the bytes given; None if it is busy."""
        ...

    def interrupt(self) -> bool:
        """Ask a busy engine to make room at once."""
        ...


class Governor:
    """Keeps one cache within what the machine can spare.

    ``start`` takes one reading and decides at once, so that the gate stands before the first token. A context manager:
    leaving it stops the thread and lifts the limit.

    Args:
        cache: what is governed.
        source: where readings come from; it is closed by ``stop``.
        settings: constants of the law.
        adapt: bounds within which they follow what the machine shows; None: they stay as they are.
        instrument: sees readings and decisions; what it raises is logged once.
        trigger: wakes the thread between two readings; it is closed by ``stop``.
        monitor: how often it looks.
        sharing: the other caches under the same limit; they are left by ``stop``. None: it is alone.
    """

    def __init__(
        self,
        cache: Governed,
        source: PressureSource,
        *,
        settings: LawSettings | None = None,
        adapt: AdaptSettings | None = None,
        instrument: Instrument | None = None,
        trigger: Trigger | None = None,
        monitor: MonitorSettings | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        self.cache = cache
        self.sharing = sharing
        self.settings = self.given = settings or LawSettings()
        self.adapt, self.learned = adapt, AdaptState()
        self.instrument = guarded(instrument)
        self.state = State()
        self.decision: Decision | None = None
        self.reading: Reading | None = None
        self.stall_us_at_start: int | None = None
        self._source = source
        self._returned_bytes = 0
        self._stopped = False
        self._trigger = trigger
        self.monitor = Monitor(source, on_reading=self.on_reading, trigger=trigger, settings=monitor)

    def on_reading(self, reading: Reading) -> None:
        """One tick: decide, set the gate, and if the cache is above it have it shrink. Nothing after `stop`."""
        if self._stopped:
            return
        status = self.cache.status()
        if self.reading is not None and status.returned_bytes > self._returned_bytes:
            # whoever gave it, the engine or this thread: the law must not take it for something else
            self.state = record_given(self.state, self.reading, status.returned_bytes - self._returned_bytes)
        self._returned_bytes = max(self._returned_bytes, status.returned_bytes)  # a cache that is made anew counts anew
        if self.adapt is not None:
            self.settings, self.learned = adapt(reading, status, self.learned, self.given, self.adapt)
        fellows = self.sharing.look(reading, status, self.state) if self.sharing else None
        decision, self.state = decide(reading, status, self.state, self.settings, fellows)
        changed = self.decision is None or _differs(decision, self.decision)
        self.decision, self.reading = decision, reading
        if self.stall_us_at_start is None:
            self.stall_us_at_start = reading.memory.some.total_us
        self.cache.set_limit(decision.limit_bytes, self.settings.pressed_chunk_tokens if decision.pressed else None)
        self.instrument.event("reading", reading)
        if changed:
            self.instrument.event("decision", decision)
        if decision.give_bytes > 0 and not self._stopped:
            given = self.cache.give_now()
            if given is None and decision.urgent:
                self.cache.interrupt()

    @property
    def stall_s(self) -> float:
        """Seconds of memory stall (``some``) since the start, in the scope of the last reading."""
        if self.reading is None or self.stall_us_at_start is None:
            return 0.0
        return max(0, self.reading.memory.some.total_us - self.stall_us_at_start) / 1e6

    def explained(self) -> list[str]:
        """What was learned so far: a short sentence for each setting that is no longer what it was at first."""
        if self.adapt is None or self.reading is None:
            return []
        return explain(self.reading.headroom.limit_bytes, self.settings, self.learned, self.given)

    def start(self) -> Governor:
        """Decide once, then keep watching in a thread of its own."""
        try:
            self.on_reading(self._source.read())
            self.monitor.start()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the thread, close the source and lift the limit; may be called twice."""
        self._stopped = True
        self.monitor.stop()
        if self._trigger is not None:
            self._trigger.close()
        self._source.close()
        if self.sharing is not None:
            self.sharing.close()
        self.cache.set_limit(self.cache.status().capacity_bytes, None)

    def __enter__(self) -> Governor:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _differs(new: Decision, old: Decision) -> bool:
    """Whether a decision is worth telling: something is given, or its kind changed."""
    return new.give_bytes > 0 or (new.pressed, new.urgent, new.withheld) != (old.pressed, old.urgent, old.withheld)
