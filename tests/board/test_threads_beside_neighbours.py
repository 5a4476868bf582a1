"""A real server beside programs that really compute: threads go and come back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvpsi.bench.admission.server import Neighbours
from kvpsi.bench.client import attempt, said_by
from kvpsi.pressure.cpu import allowed_cpus
from support.servers import Served, serving

pytestmark = [pytest.mark.engine, pytest.mark.pressure]


def within_s(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return met


def threads(served: Served) -> int:
    return int(served.get("/v1/kvpsi/status")["threads"])


def test_threads_make_way_for_neighbours_and_come_back(default_model: Path, tmp_path: Path) -> None:
    n_cpus = len(allowed_cpus())
    if n_cpus < 2 or n_cpus > 16:
        pytest.skip(f"ADAPTING THREADS IS NOT TRIED HERE: it takes 2 to 16 processors, not {n_cpus}.")
    neighbours = Neighbours()
    with serving(default_model, tmp_path, "-t", "0", "-c", "2048") as served:
        assert within_s(20, lambda: threads(served) == n_cpus)
        try:
            neighbours.come(os.cpu_count() or 1)
            # an answer meanwhile: what waits for a processor can only be seen while it computes
            made = attempt(f"{served.url}/v1", [said_by("user", "Count to twenty.")], 64)
            assert not made.problem and made.n_tokens > 0
            assert within_s(10, lambda: threads(served) <= n_cpus // 2)
        finally:
            neighbours.go()
        assert within_s(40, lambda: threads(served) == n_cpus)
        text = served.get("/v1/kvpsi/history")["events"]
        assert any("others use" in event["text"] for event in text)
