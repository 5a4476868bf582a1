"""What a governed vLLM tells: its status, its metrics, and what `kvpsi top` makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from kvpsi.engines.vllm.report import STATUS_PATH, StatusServer, VllmStatus
from kvpsi.errors import EnvironmentProblem

STATUS = VllmStatus(
    model="small",
    running=1,
    waiting=2,
    parallel=8,
    capacity_bytes=100,
    used_bytes=30,
    committed_bytes=40,
    resident_bytes=41,
    limit_bytes=60,
    may_hold_bytes=0,
    all_may_hold_bytes=0,
    share_weight=1.0,
    all_shares_weight=1.0,
    headroom_bytes=500,
    memory_limit_bytes=1000,
    memory_pressure=0.1,
    concurrency_limit=4,
    stall_s=0.5,
    releases=3,
    returned_bytes=70,
    pauses=5,
    governed=True,
    reason="calm",
    reserve_bytes=24 << 20,
    regrow_bytes=48 << 20,
    learned=[],
    blocks=10,
    pool_blocks=6,
)


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        return str(response.read().decode())


def test_status_and_metrics_are_served() -> None:
    server = StatusServer(0, lambda: STATUS)
    try:
        assert json.loads(get(server.port, STATUS_PATH))["returned_bytes"] == 70
        metrics = get(server.port, "/metrics").splitlines()
        assert "kvpsi_kv_resident_bytes 41.0" in metrics and "kvpsi_returned_bytes_total 70.0" in metrics
        assert "kvpsi_reserve_bytes 2.5165824e+07" in metrics
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(server.port, "/")
        refused.value.close()
        with pytest.raises(EnvironmentProblem, match="KVPSI_STATUS_PORT"):
            StatusServer(server.port, lambda: STATUS)
    finally:
        server.close()


def test_top_shows_it() -> None:
    server = StatusServer(0, lambda: STATUS)
    try:
        command = [sys.executable, "-m", "kvpsi", "top", "--url", f"127.0.0.1:{server.port}", "--once"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "150"})
    finally:
        server.close()
    assert done.returncode == 0, done.stderr
    for shown in ("small", "answering 1 of 8, 2 waiting", "5 answers paused", "grows back above 48 MiB", "calm"):
        assert shown in done.stdout
