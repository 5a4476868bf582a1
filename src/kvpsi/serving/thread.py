"""The one thread in which llama.cpp computes.

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


class ComputingThread:
    """Does what it is given, one after the other, until it is stopped."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="kvpsi-engine", daemon=True)
        self._thread.start()

    def call(self, work: Callable[..., R], *args: Any) -> Future[R]:
        """Have it call something, after what it was given before."""
        future: Future[R] = Future()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work(*args))
            except BaseException as error:  # whoever asked is told
                future.set_exception(error)

        self._work.put(do)
        return future

    def stop(self) -> None:
        """Wait until it has done what it was given, and end it."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
