"""The thread that runs the law of threads on a live engine: look at the processors, decide, have it computed so."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from kvpsi.governor.threads import ThreadDecision, ThreadSettings, ThreadState, decide_threads
from kvpsi.instrument import Instrument, guarded
from kvpsi.pressure.cpu import CpuReading, CpuSource

log = logging.getLogger("kvpsi")
_PERIOD_S = 0.2
_IDLE_PERIOD_S = 1.0


class Computes(Protocol):
    """Whose threads are governed; `kvpsi.kv.GatedCache` is such."""

    def set_threads(self, n_threads: int) -> None:
        """Compute with so many threads from the next decode on; callable from any thread."""
        ...

    def interrupt(self) -> bool:
        """Stop what is being computed, so that it is done again; callable from any thread."""
        ...


class CpuGovernor:
    """Keeps the threads that compute within what the processors have room for.

    ``start`` looks once and decides at once. A context manager.

    Args:
        engine: what computes; None: the processors are only watched.
        source: where readings come from; it is closed by ``stop``.
        settings: constants of the law.
        instrument: sees decisions that change something, as ``threads``.
    """

    def __init__(
        self,
        engine: Computes | None,
        source: CpuSource | None = None,
        *,
        settings: ThreadSettings | None = None,
        instrument: Instrument | None = None,
    ) -> None:
        self.engine = engine
        self.settings = settings or ThreadSettings()
        self.instrument = guarded(instrument)
        self.state = ThreadState()
        self.reading: CpuReading | None = None
        self.decision: ThreadDecision | None = None
        self.changes = 0
        self._source = source or CpuSource()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvpsi-cpu", daemon=True)

    def look(self) -> CpuReading:
        """Look once, decide, and have it done."""
        reading = self._source.read()
        decision, self.state = decide_threads(reading, self.state, self.settings)
        before, self.decision, self.reading = self.decision, decision, reading
        if self.engine is not None and (before is None or decision.n_threads != before.n_threads):
            self.changes += before is not None
            self.engine.set_threads(decision.n_threads)
            self.instrument.event("threads", decision)
            if before is not None and decision.n_threads < before.n_threads:
                self.engine.interrupt()  # with too many threads one decode may take minutes
        return reading

    def start(self) -> CpuGovernor:
        """Decide once, then keep looking in a thread of its own."""
        self.look()
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread and close the source; may be called twice."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._source.close()

    def __enter__(self) -> CpuGovernor:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        failed = False
        period_s = _PERIOD_S
        while not self._ended.wait(period_s):
            try:
                busy = self.look().own_cpus >= self.settings.idle_cpus
                period_s = _PERIOD_S if busy else _IDLE_PERIOD_S
            except Exception as error:  # the engine goes on with the threads that it has
                log.log(logging.DEBUG if failed else logging.WARNING, "Governing the threads failed: %r", error)
                failed = True
