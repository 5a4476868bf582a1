"""A process of its own that holds one model, stock or elastic, and does what its parent asks for, line by line."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import llama_cpp

from kvpsi.bench.conversation import text_tokens
from kvpsi.engines.llama import govern
from kvpsi.engines.loading import LoadSettings, open_llama, show_errors_only
from kvpsi.errors import KvpsiError
from kvpsi.kv.pages import process_rss_bytes

Kind = Literal["stock", "elastic"]


class Worker:
    """The parent's end; see `worker`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.idle_rss_bytes = int(self._ask())

    def read(self, n_tokens: int) -> None:
        """Read a prompt of so many tokens."""
        self._ask("read", n_tokens)

    def decode_seconds(self, n_tokens: int) -> float:
        """Time of decoding so many tokens, one after the other, behind those that are there."""
        return self._ask("decode", n_tokens)

    def _ask(self, *question: str | int) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        if question:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise KvpsiError("A process of the bench ended early; its last lines above say why.")
        return float(json.loads(answer))


@contextlib.contextmanager
def worker(kind: Kind, model: Path, load: LoadSettings) -> Iterator[Worker]:
    """A fresh process that has loaded the model and waits; ended on leaving, and by itself if the parent is gone."""
    settings = json.dumps({"n_ctx": load.n_ctx, "n_threads": load.n_threads, "kv_type": load.kv_type})
    command = [sys.executable, "-m", "kvpsi.bench.elastic.worker", kind, str(model), settings]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Worker(process)
        finally:
            process.kill()


def _decode_seconds(llm: llama_cpp.Llama, depth: int, tokens: list[int]) -> float:
    """Time in which the tokens are decoded one by one where the model stands; at its end it goes back to ``depth``."""
    if llm.n_tokens + len(tokens) > llm.n_ctx():
        llm.n_tokens = depth
    started = time.perf_counter()
    for token in tokens:
        llm.eval([token])
    return time.perf_counter() - started


def main(kind: str, model: str, settings: str) -> None:
    """Answer questions until standard input ends; the first answer, unasked, is the resident set when idle."""
    show_errors_only()
    load = LoadSettings(**json.loads(settings))
    llm = open_llama(Path(model), load.n_ctx, load)
    governed = govern(llm) if kind == "elastic" else None
    time.sleep(0.5)
    print(process_rss_bytes(), flush=True)
    depth = 0
    for line in sys.stdin:
        what, n_tokens = json.loads(line)
        answer = 0.0
        if what == "read":
            depth = n_tokens
            llm.eval(text_tokens(llm, depth))
        else:
            answer = _decode_seconds(llm, depth, text_tokens(llm, n_tokens))
        print(answer, flush=True)
    if governed is not None:
        governed.close()
    llm.close()


if __name__ == "__main__":
    main(*sys.argv[1:4])
