"""The same work for many jobs, on several processors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def spread(work: Callable[..., T], jobs: Sequence[tuple[Any, ...]], n_jobs: int | None) -> Iterator[T]:
    """What ``work`` makes of each job's arguments, in their order, on so many processors at once (None: all).

    Whoever stops asking, as with Ctrl-C, ends what is being worked on.
    """
    n_jobs = min(len(jobs), n_jobs or os.cpu_count() or 1)
    if n_jobs <= 1:
        yield from (work(*job) for job in jobs)
        return
    others = multiprocessing.active_children()
    # processes that begin anew: what is forked while other threads run may hang
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_jobs, mp_context=spawn, initializer=_begin) as pool:
        try:
            # not `map`, which cancels what waits while the pool may be telling it that its processes are gone
            futures = [pool.submit(work, *job) for job in jobs]
            for future in futures:
                yield future.result()
        except BaseException:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            raise


def _begin() -> None:
    """A process that works: whoever started it decides when it ends, and it ends with them, however they do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
