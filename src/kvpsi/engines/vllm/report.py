"""What the balloon is doing, for people and dashboards: status and metrics of the scheduler's process, at the
paths that `kvpsi serve` has.

vLLM's own metrics are another process's, so these have a port of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from kvpsi.engines.metrics import memory_counters, memory_gauges
from kvpsi.errors import EnvironmentProblem

STATUS_PATH = "/v1/kvpsi/status"


@dataclass(frozen=True, slots=True)
class VllmStatus:
    """The fields of `kvpsi.serving.status.Status` that have a meaning here, and two of vLLM's own: ``blocks`` are all,
    ``pool_blocks`` those that vLLM may use now. ``committed_bytes`` is what holds memory, ``used_bytes`` what requests
    use."""

    model: str
    running: int
    waiting: int
    parallel: int
    capacity_bytes: int
    used_bytes: int
    committed_bytes: int
    resident_bytes: int
    limit_bytes: int
    may_hold_bytes: int
    all_may_hold_bytes: int
    share_weight: float
    all_shares_weight: float
    headroom_bytes: int
    memory_limit_bytes: int
    memory_pressure: float
    concurrency_limit: int
    stall_s: float
    releases: int
    returned_bytes: int
    pauses: int
    governed: bool
    reason: str
    reserve_bytes: int
    regrow_bytes: int
    learned: list[str]
    blocks: int
    pool_blocks: int


def metrics_text(status: VllmStatus) -> bytes:
    """In Prometheus' format, by the names that `kvpsi serve` uses."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector

    class Collected(Collector):
        def collect(self) -> Iterator[Metric]:
            for name, text, value in memory_counters(status):
                yield CounterMetricFamily(name, text, value=value)
            for name, text, value in (*memory_gauges(status), *_own_gauges(status)):
                yield GaugeMetricFamily(name, text, value=value)

    registry = CollectorRegistry()
    registry.register(Collected())
    return generate_latest(registry)


def _own_gauges(status: VllmStatus) -> Iterator[tuple[str, str, float]]:
    yield "kvpsi_blocks", "KV blocks of vLLM.", status.blocks
    yield "kvpsi_pool_blocks", "KV blocks that vLLM may use now.", status.pool_blocks


class StatusServer:
    """Answers on this machine only, in a thread of its own.

    Args:
        port: where; 0 takes a free one.
        status: called for each request.

    Raises:
        EnvironmentProblem: the port is taken.
    """

    def __init__(self, port: int, status: Callable[[], VllmStatus]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, code = self.path.partition("?")[0].rstrip("/"), 200
                if path == STATUS_PATH:
                    kind, body = "application/json", json.dumps(dataclasses.asdict(status())).encode()
                elif path == "/metrics":
                    kind, body = "text/plain; version=0.0.4", metrics_text(status())
                else:
                    code, kind, body = 404, "text/plain", f"There are {STATUS_PATH} and /metrics.\n".encode()
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                with contextlib.suppress(ConnectionError):  # who asked is gone
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing: who reads metrics does so all the time."""

        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise EnvironmentProblem(
                f"The status cannot be served at port {port} ({error}); choose another KVPSI_STATUS_PORT."
            ) from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="kvpsi-status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer nobody any more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
