"""The server of the benches, with what tests do to it and ask of it besides."""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpsi.bench.vllm import server
from kvpsi.bench.vllm.server import Server, Setting, Starts, read

_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1"}


@dataclass(frozen=True)
class Served(Server):
    """A running server whose files are in ``folder``."""

    folder: Path

    @property
    def log(self) -> Path:
        """What vLLM says."""
        return self.folder / "vllm.log"

    def limit(self, n_blocks: int) -> None:
        """Tell a `SteeredScheduler` how many blocks may be in the pool."""
        self._write("limit", str(n_blocks))

    @contextlib.contextmanager
    def toggled(self, seed: int, choices: Sequence[int]) -> Iterator[None]:
        """The limit jumps between so many blocks meanwhile."""
        ended, chance = threading.Event(), random.Random(seed)

        def toggle() -> None:
            while not ended.wait(chance.uniform(0.02, 0.3)):
                self.limit(chance.choice(choices))

        toggling = threading.Thread(target=toggle)
        toggling.start()
        try:
            yield
        finally:
            ended.set()
            toggling.join()

    def stall(self, share: float) -> None:
        """Tell it that memory stalls for a share (0 to 1) of the time."""
        self._write("stall", str(share))

    def _write(self, name: str, text: str) -> None:
        scratch = self.folder / f"{name}.new"
        scratch.write_text(text)
        scratch.replace(self.folder / name)

    def events(self) -> list[str]:
        """What kvpsi wrote down, a JSON line each."""
        return (self.folder / "events.jsonl").read_text().splitlines()

    def vllm_metric(self, name: str) -> float:
        """What vLLM measures."""
        for line in read(self.url.replace("/v1", "/metrics")).splitlines():
            if line.startswith(f"vllm:{name}{{"):
                return float(line.split()[-1])
        raise AssertionError(name)

    def reset_prefix_cache(self) -> None:
        """Have vLLM forget what is cached (there with ``VLLM_SERVER_DEV_MODE=1`` only)."""
        request = urllib.request.Request(self.url.replace("/v1", "/reset_prefix_cache"), b"", method="POST")
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.status == 200

    def answer(self, prompt: str, n_tokens: int, **more: int) -> str:
        """The likeliest text, always so many tokens; ``more`` goes into the request."""
        with self._asked(prompt, n_tokens, stream=False, **more) as response:
            said = json.loads(response.read())
        assert said["usage"]["completion_tokens"] == n_tokens, said
        return str(said["choices"][0]["text"])

    def hang_up(self, prompt: str, after_tokens: int) -> None:
        """Ask for a long text, and be gone after so many tokens of it."""
        with self._asked(prompt, 200, stream=True) as response:
            for _ in range(2 * after_tokens):  # an empty line follows each
                response.readline()

    def _asked(self, prompt: str, n_tokens: int, *, stream: bool, **more: int) -> Any:
        body = {"model": "default", "prompt": prompt, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.url}/completions",
            json.dumps({**body, **more, "stream": stream}).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=300)

    def answers(self, prompts: Sequence[str], n_tokens: int, n_clients: int = 8) -> list[str]:
        """Of several clients at once."""
        with ThreadPoolExecutor(n_clients) as clients:
            return list(clients.map(lambda prompt: self.answer(prompt, n_tokens), prompts))


@contextlib.contextmanager
def serving(
    setting: Setting,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    start: Starts | None = None,
) -> Iterator[Served]:
    """A server until the block ends; stock vLLM unless ``environment`` or the setting's options say otherwise."""
    own = {"KVPSI_TEST_FOLDER": str(folder), "KVPSI_LOG": str(folder / "events.jsonl")}
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environ = {**_ENVIRONMENT, **own, "PYTHONPATH": path, **(environment or {})}
    with server.serving(setting, folder / "vllm.log", environ, start) as up:
        yield Served(up.process, up.url, up.status_url, folder)
