"""A real vLLM server in processes of its own, and questions to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

START_S = 400
KV_GIB = 1
OPTIONS = ("--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager", "--served-model-name", "model")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[Any]
    url: str
    status_url: str
    log: Path
    folder: Path

    def limit(self, n_blocks: int) -> None:
        """Tell a `SteeredScheduler` how many blocks may be in the pool."""
        self._write("limit", str(n_blocks))

    def stall(self, share: float) -> None:
        """Tell it that memory stalls for a share (0 to 1) of the time."""
        self._write("stall", str(share))

    def _write(self, name: str, text: str) -> None:
        scratch = self.folder / f"{name}.new"
        scratch.write_text(text)
        scratch.replace(self.folder / name)

    def status(self) -> Any:
        """What kvpsi says."""
        return json.loads(_read(f"{self.status_url}/status"))

    def events(self) -> list[str]:
        """What kvpsi wrote down, a JSON line each."""
        return (self.folder / "events.jsonl").read_text().splitlines()

    def metrics(self) -> str:
        """What kvpsi measures."""
        return _read(f"{self.status_url}/metrics")

    def vllm_metric(self, name: str) -> float:
        """What vLLM measures."""
        for line in _read(f"{self.url}/metrics").splitlines():
            if line.startswith(f"vllm:{name}{{"):
                return float(line.split()[-1])
        raise AssertionError(name)

    def reset_prefix_cache(self) -> None:
        """Have vLLM forget what is cached (there with ``VLLM_SERVER_DEV_MODE=1`` only)."""
        request = urllib.request.Request(f"{self.url}/reset_prefix_cache", b"", method="POST")
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.status == 200

    def worker(self) -> psutil.Process:
        """The process that holds the KV tensors."""
        (found,) = (p for p in psutil.Process(self.process.pid).children(recursive=True) if "Worker" in p.name())
        return found

    def rss_bytes(self) -> int:
        """Of the worker."""
        return int(self.worker().memory_info().rss)

    def answer(self, prompt: str, n_tokens: int) -> str:
        """The likeliest text, always so many tokens."""
        body = {"model": "model", "prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            said = json.loads(response.read())
        assert said["usage"]["completion_tokens"] == n_tokens, said
        return str(said["choices"][0]["text"])

    def answers(self, prompts: Sequence[str], n_tokens: int, n_clients: int = 8) -> list[str]:
        """Of several clients at once."""
        with ThreadPoolExecutor(n_clients) as clients:
            return list(clients.map(lambda prompt: self.answer(prompt, n_tokens), prompts))


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:
        return str(response.read().decode())


class Starts(Protocol):
    """Starts a command, here or on a board."""

    def __call__(self, command: Sequence[str], *, env: dict[str, str], stdout: Any, stderr: Any) -> Any: ...


@contextlib.contextmanager
def serving(
    model: Path,
    folder: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    start: Starts = subprocess.Popen,
) -> Iterator[Served]:
    """A server until the block ends; stock vLLM unless ``environment`` says otherwise."""
    port, status_port = _free_port(), _free_port()
    log = folder / "vllm.log"
    # the command `vllm` wants a distribution of that name, which vllm-cpu is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    own = {"KVPSI_STATUS_PORT": str(status_port), "KVPSI_TEST_FOLDER": str(folder)}
    own["KVPSI_LOG"] = str(folder / "events.jsonl")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, **ENVIRONMENT, **own, "PYTHONPATH": path, **(environment or {})}
    with log.open("wb") as output:
        process = start([*command, *OPTIONS, *options], env=environ, stdout=output, stderr=output)
    served = Served(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{status_port}", log, folder)
    try:
        deadline_s = time.monotonic() + START_S
        while not _is_ready(served):
            assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()[-5000:]
            time.sleep(0.5)
        yield served
    finally:
        _end(process)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _is_ready(served: Served) -> bool:
    try:
        _read(f"{served.url}/health")
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True


def _end(process: subprocess.Popen[Any]) -> None:
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.kill()
    process.wait()
