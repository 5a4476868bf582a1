"""Threads that do what they are given, of which one is the only one in which llama.cpp computes.

llama.cpp's workers wait for each other thousands of times a token by spinning. Built with OpenMP, as it usually is,
each thread that ever computed has workers of its own, and as soon as there are more of them than processors they hardly
spin any more but sleep, which takes several times as long (docs/decisions/0006). So the model is loaded, tried out and
used by the same thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

R = TypeVar("R")


def job_of(work: Callable[..., R], *args: Any) -> tuple[Callable[[], None], Future[R]]:
    """What another thread is to do, and where it tells what came of it."""
    future: Future[R] = Future()

    def do() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work(*args))
        except BaseException as error:  # whoever asked is told
            future.set_exception(error)

    return do, future


class WorkThread:
    """Does what it is given, one after the other, until it is stopped."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Callable[..., R], *args: Any) -> Future[R]:
        """Have it call something, after what it was given before.

        Raises:
            RuntimeError: it was stopped.
        """
        if self._stopped:
            raise RuntimeError("The thread was stopped.")
        job, future = job_of(work, *args)
        self._work.put(job)
        return future

    def stop(self, timeout_s: float | None = None) -> bool:
        """Wait until it has done what it was given, and end it; whether it has ended. Not from the thread itself."""
        self._stopped = True
        self._work.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class ComputingThread(WorkThread):
    """The one that loads the model and decodes."""

    def __init__(self) -> None:
        super().__init__("kvpsi-engine")
