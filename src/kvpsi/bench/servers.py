"""The servers that are compared, each in a process of its own, with the same context, places and threads."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

from kvpsi.bench.processes import free_port
from kvpsi.engines.loading import LoadSettings
from kvpsi.errors import EnvironmentProblem, UsageError

Name = Literal["kvpsi", "kvpsi-streams", "xllamacpp", "llama-cpp-python"]
"""``kvpsi-streams`` is kvpsi with a part of the cache for each answer instead of one that all share."""
Start = Callable[[Sequence[str]], "subprocess.Popen[Any]"]
"""Starts a command."""
_START_S = 120.0
_MODULES = {
    "kvpsi": "fastapi",
    "kvpsi-streams": "fastapi",
    "xllamacpp": "xllamacpp",
    "llama-cpp-python": "sse_starlette",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What all of them get: the model, tokens of context in all, answers at once, and threads.

    ``spill_max`` and ``options`` are kvpsi's own: how much of its conversations may be parked in files, and more of
    what `kvpsi serve` takes.
    """

    model: Path
    n_ctx: int
    n_parallel: int
    n_threads: int
    spill_max: str = "4G"
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        LoadSettings(self.n_ctx, self.n_threads)  # complains of what llama.cpp would not take


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers at ``url``."""

    name: Name
    url: str
    process: psutil.Process

    @property
    def rss_bytes(self) -> int:
        """Its resident set."""
        return int(self.process.memory_info().rss)

    @property
    def is_alive(self) -> bool:
        """Whether its process still runs."""
        return bool(self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE)

    def capacity_bytes(self) -> int:
        """What kvpsi's cache can be at most; 0 for others, which do not say."""
        if not self.name.startswith("kvpsi"):
            return 0
        with urllib.request.urlopen(f"{self.url}/kvpsi/status", timeout=30) as answer:
            return int(json.load(answer)["capacity_bytes"])


def names_in(text: str) -> tuple[Name, ...]:
    """The servers that a list names.

    Raises:
        UsageError: there is one that nobody knows, or one twice.
    """
    known: tuple[Name, ...] = get_args(Name)
    found = tuple(name for each in text.split(",") for name in known if name == each.strip())
    if len(found) < len(text.split(",")):
        raise UsageError(f"The servers are {', '.join(known)}, not {text}.")
    if len(set(found)) < len(found):
        raise UsageError("Name each server once.")
    return found


def missing_of(names: Sequence[Name]) -> list[Name]:
    """Those that are not installed.

    Raises:
        EnvironmentProblem: that is all of them.
    """
    missing = [name for name in names if importlib.util.find_spec(_MODULES[name]) is None]
    if len(missing) == len(names):
        raise EnvironmentProblem(f"None of {', '.join(names)} is installed; `pip install kvpsi[bench]` does that.")
    return missing


def left_out(name: Name) -> str:
    """What is told of one that is not installed."""
    return f"{name} is not installed and left out: `pip install kvpsi[bench]` installs it."


def _start(command: Sequence[str]) -> subprocess.Popen[Any]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def running(name: Name, setting: Setting, start: Start = _start) -> Iterator[Running]:
    """Start one, wait until it answers, and end it afterwards.

    Raises:
        EnvironmentProblem: it did not come up.
    """
    port = free_port()
    process = start(_command(name, setting, port))
    try:
        url = f"http://127.0.0.1:{port}/v1"
        _wait_until_it_answers(process, url, name)
        yield Running(name, url, psutil.Process(process.pid))
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _command(name: Name, s: Setting, port: int) -> list[str]:
    python = [sys.executable, "-m"]
    if name in ("kvpsi", "kvpsi-streams"):
        sizes = ["-c", str(s.n_ctx), "-np", str(s.n_parallel), "-t", str(s.n_threads)]
        sizes += ["--spill-max", s.spill_max, *s.options]
        sizes += ["--no-kv-unified"] if name == "kvpsi-streams" else []
        return [*python, "kvpsi", "serve", "-m", str(s.model), "--port", str(port), *sizes]
    if name == "xllamacpp":
        sizes = [str(s.n_ctx), str(s.n_parallel), str(s.n_threads)]
        return [*python, "kvpsi.bench.servers", str(s.model), str(port), *sizes]
    sizes = ["--n_ctx", str(s.n_ctx), "--n_threads", str(s.n_threads), "--n_threads_batch", str(s.n_threads)]
    # by default each new request cuts the stream off that is being sent
    how = ["--flash_attn", "true", "--interrupt_requests", "false"]
    return [*python, "llama_cpp.server", "--model", str(s.model), "--port", str(port), *how, *sizes]


def _wait_until_it_answers(process: subprocess.Popen[Any], url: str, name: Name) -> None:
    deadline = time.monotonic() + _START_S
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "model": "default"})
    request = urllib.request.Request(
        f"{url}/chat/completions", body.encode(), {"Content-Type": "application/json"}, method="POST"
    )
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(request, timeout=30) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise EnvironmentProblem(f"The server of {name} did not come up; start it by hand to see why.")


def _serve_xllamacpp(model: str, port: int, n_ctx: int, n_parallel: int, n_threads: int) -> None:
    """llama.cpp's own server (llama-server), as xllamacpp's wheel has it, until SIGTERM."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_ctx, params.n_parallel = n_ctx, n_parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
    server = xllamacpp.Server(params)
    while server is not None:
        time.sleep(3600)


if __name__ == "__main__":
    _serve_xllamacpp(sys.argv[1], *map(int, sys.argv[2:6]))
