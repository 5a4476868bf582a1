"""The thread that senses: reads a source as often as the memory left demands and hands the readings on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kvpsi.pressure.base import PressureSource
from kvpsi.pressure.interval import MonitorSettings, next_interval_s
from kvpsi.pressure.reading import Reading
from kvpsi.pressure.trigger import Trigger
from kvpsi.pressure.wakeup import Wakeup

Listener = Callable[[Reading], object]
_LOG = logging.getLogger(__name__)


class Monitor:
    """Reads ``source`` in a daemon thread and calls the listeners there, one after the other.

    ``source`` and ``trigger`` stay the caller's: close them after ``stop``. An exception in either the
    source or a listener is logged and kept in ``last_error``, counted in ``error_count``, and does not end
    the loop. ``tick`` does one round without a thread, for simulations and tests.
    """

    def __init__(
        self,
        source: PressureSource,
        *,
        on_reading: Listener | None = None,
        clock: Callable[[], float] = time.monotonic,
        trigger: Trigger | None = None,
        settings: MonitorSettings | None = None,
    ) -> None:
        self._source = source
        self._listeners: tuple[Listener, ...] = () if on_reading is None else (on_reading,)
        self._clock = clock
        self._trigger = trigger
        self._settings = settings or MonitorSettings()
        self._alert_until_s = float("-inf")
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wakeup: Wakeup | None = None
        self._stopping = threading.Event()
        self.latest: Reading | None = None
        self.last_error: Exception | None = None
        self.error_count = 0
        self.tick_count = 0

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Add a listener; the returned function removes it again."""
        with self._lock:
            self._listeners = (*self._listeners, listener)

        def unsubscribe() -> None:
            with self._lock:
                self._listeners = tuple(each for each in self._listeners if each is not listener)

        return unsubscribe

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread; does nothing while it runs."""
        with self._lock:
            if self.running:
                return
            self._stopping = threading.Event()
            self._wakeup = Wakeup()
            self._thread = threading.Thread(
                target=self._run, args=(self._wakeup, self._stopping), name="kvpsi-pressure", daemon=True
            )
            self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """End the thread and wait for it; False if a listener still holds it up.

        From within a listener it only asks the thread to end.
        """
        thread, wakeup = self._thread, self._wakeup
        if thread is None or wakeup is None:
            return True
        self._stopping.set()
        wakeup.wake()
        if thread is threading.current_thread():
            return False
        thread.join(timeout_s)
        return not thread.is_alive()

    def wake(self) -> None:
        """Read at once, from any thread; does nothing while stopped."""
        wakeup = self._wakeup
        if wakeup is not None:
            wakeup.wake()

    def __enter__(self) -> Monitor:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def tick(self) -> float:
        """Read once, hand the reading on, and return the seconds until the next one is due."""
        self.tick_count += 1
        try:
            reading = self._source.read()
            alert = self._clock() < self._alert_until_s
            interval_s = next_interval_s(reading, self._settings, alert=alert)
        except Exception as error:
            self._record(error, "The pressure source failed")
            return self._settings.stalled_interval_s
        self.latest = reading
        for listener in self._listeners:
            try:
                listener(reading)
            except Exception as error:
                self._record(error, "A listener of the pressure monitor failed")
        return interval_s

    def _run(self, wakeup: Wakeup, stopping: threading.Event) -> None:
        try:
            while not stopping.is_set():
                began_s = self._clock()
                due_s = began_s + self.tick()
                if stopping.is_set():
                    break
                self._sleep(wakeup, max(self._settings.min_interval_s / 2, due_s - self._clock()))
        finally:
            wakeup.close()

    def _sleep(self, wakeup: Wakeup, timeout_s: float) -> None:
        try:
            fired = wakeup.sleep(timeout_s, self._trigger)
        except OSError as error:
            # The trigger was closed under us: go on without it.
            self._record(error, "The pressure trigger failed")
            self._trigger = None
            return
        if fired:
            self._alert_until_s = self._clock() + self._settings.alert_s
        if self._trigger is not None and not self._trigger.alive:
            _LOG.warning("the pressure trigger on %s is gone; polling goes on", self._trigger.path)
            self._trigger = None

    def _record(self, error: Exception, what: str) -> None:
        repeated = type(error) is type(self.last_error) and str(error) == str(self.last_error)
        self.last_error = error
        self.error_count += 1
        _LOG.log(logging.DEBUG if repeated else logging.WARNING, "%s: %r", what, error)
