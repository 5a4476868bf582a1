"""A sleep that ends early: when someone calls, or when the kernel's trigger fires."""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading

from kvpsi.pressure.trigger import Trigger


class Wakeup:
    """``sleep`` in one thread, ``wake`` from any other. Without poll (Windows) triggers are ignored."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._pipe: tuple[int, int] | None = None
        if hasattr(select, "poll"):
            self._pipe = os.pipe()
            for fd in self._pipe:
                os.set_blocking(fd, False)

    def wake(self) -> None:
        """End the current sleep, or the next one if nobody sleeps now. Does nothing after ``close``."""
        self._event.set()
        with self._lock:
            if self._pipe is not None:
                with contextlib.suppress(BlockingIOError):
                    os.write(self._pipe[1], b"\0")

    def sleep(self, timeout_s: float, trigger: Trigger | None = None) -> bool:
        """Sleep at most ``timeout_s``; True if the trigger ended it."""
        if self._pipe is None:
            self._event.wait(timeout_s)
            self._event.clear()
            return False
        reader = self._pipe[0]
        poll = select.poll()
        poll.register(reader, select.POLLIN)
        if trigger is not None and trigger.alive and trigger.fileno() >= 0:
            poll.register(trigger.fileno(), trigger.events)
        # Rounded up: a timeout of 0 ms would make a short sleep spin.
        happened = dict(poll.poll(math.ceil(max(0.0, timeout_s) * 1000)))
        if happened.pop(reader, 0):
            self._event.clear()
            with contextlib.suppress(BlockingIOError):
                while len(os.read(reader, 4096)) == 4096:
                    pass
        return trigger is not None and any(trigger.accept(events) for events in happened.values())

    def close(self) -> None:
        """Only when nobody sleeps any more."""
        with self._lock:
            if self._pipe is not None:
                for fd in self._pipe:
                    os.close(fd)
                self._pipe = None
