"""A vLLM server in processes of its own, stock or governed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from kvpsi.bench.processes import free_port
from kvpsi.engines.vllm.report import STATUS_PATH
from kvpsi.errors import EnvironmentProblem

GOVERNED: Mapping[str, str] = {"KVPSI_VLLM": "1"}
_START_S = 400.0
_END_S = 30.0
# one thread each, as several servers share the processors, and the clients need one as well
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What stock and governed servers both get.

    Attributes:
        model: a Hugging Face folder.
        kv_gib: GiB of KV cache.
        max_model_len: tokens of the longest request.
        max_num_seqs: sequences at once.
        options: more of vLLM's own.
    """

    model: Path
    kv_gib: int = 1
    max_model_len: int = 512
    max_num_seqs: int = 8
    options: tuple[str, ...] = ("--enforce-eager",)

    def command(self, port: int) -> list[str]:
        """Of a server at this port; its model's name is ``default``."""
        # the command `vllm` wants a distribution of that name, which vllm-cpu is not
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.model)]
        command += ["--served-model-name", "default", "--port", str(port)]
        command += ["--max-model-len", str(self.max_model_len), "--max-num-seqs", str(self.max_num_seqs)]
        return [*command, *self.options]


@dataclass(frozen=True)
class Server:
    """A running server. It answers at ``url``, kvpsi's status, if it is governed, is at ``status_url``."""

    process: subprocess.Popen[Any]
    url: str
    status_url: str

    def status(self) -> dict[str, Any]:
        """What kvpsi says.

        Raises:
            EnvironmentProblem: it does not answer.
        """
        try:
            told: dict[str, Any] = json.loads(read(f"{self.status_url}{STATUS_PATH}"))
        except OSError as error:
            raise EnvironmentProblem(f"The governed vLLM does not tell its status ({error}).") from error
        return told

    def rss_bytes(self) -> int:
        """Resident set of the processes that hold the KV tensors."""
        return sum(int(size.rss) for name, size in self._sizes() if "Worker" in name)

    def anonymous_bytes(self) -> int:
        """Memory of all its processes that is not a file's."""
        return sum(int(size.rss - size.shared) for _, size in self._sizes())

    def _sizes(self) -> Iterator[tuple[str, Any]]:
        family: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
            family = [psutil.Process(self.process.pid)]
            family += family[0].children(recursive=True)
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                yield each.name(), each.memory_info()


class Starts(Protocol):
    """Starts a command, here or on a board."""

    def __call__(self, command: Sequence[str], *, env: dict[str, str], stdout: Any, stderr: Any) -> Any: ...


@contextlib.contextmanager
def serving(
    setting: Setting,
    log: Path,
    environment: Mapping[str, str] | None = None,
    start: Starts | None = None,
) -> Iterator[Server]:
    """A server until the block ends; stock vLLM unless ``environment`` says otherwise, as `GOVERNED` does.

    Raises:
        EnvironmentProblem: it did not come up; ``log`` has what it said.
    """
    port, status_port = free_port(), free_port()
    own = {"VLLM_CPU_KVCACHE_SPACE": str(setting.kv_gib), "KVPSI_STATUS_PORT": str(status_port)}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("KVPSI_")}
    environ = {**inherited, **_ENVIRONMENT, **own, **(environment or {})}
    with log.open("wb") as output:
        process = (start or subprocess.Popen)(setting.command(port), env=environ, stdout=output, stderr=output)
    patience_s = 0.0
    server = Server(process, f"http://127.0.0.1:{port}/v1", f"http://127.0.0.1:{status_port}")
    try:
        deadline_s = time.monotonic() + _START_S
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise EnvironmentProblem(f"vLLM did not come up; {log} says why.")
            time.sleep(0.5)
        patience_s = _END_S
        yield server
    finally:
        _end(process, patience_s)


def read(url: str) -> str:
    """What is at an address."""
    with urllib.request.urlopen(url, timeout=30) as response:
        return str(response.read().decode())


def _is_ready(port: int) -> bool:
    try:
        read(f"http://127.0.0.1:{port}/health")
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def _end(process: subprocess.Popen[Any], patience_s: float) -> None:
    """Have it end, and see that nothing of it is left; one that is just starting does not listen for long."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.kill()
    process.wait()
