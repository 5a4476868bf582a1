"""The same work for many jobs, on several processors."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def spread(work: Callable[..., T], jobs: Sequence[tuple[Any, ...]], n_jobs: int | None) -> Iterator[T]:
    """What ``work`` makes of each job's arguments, in their order, on so many processors at once (None: all)."""
    n_jobs = min(len(jobs), n_jobs or os.cpu_count() or 1)
    if n_jobs <= 1:
        yield from (work(*job) for job in jobs)
        return
    # processes that begin anew: what is forked while other threads run may hang
    with ProcessPoolExecutor(n_jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(work, *zip(*jobs, strict=True), chunksize=1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
