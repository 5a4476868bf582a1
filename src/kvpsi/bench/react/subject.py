"""The process of one model that decodes, or reads prompts, without a pause until its standard input is closed.

It writes JSON lines: ``ready``, and each time that memory goes back ``gave``: [CLOCK_MONOTONIC seconds, bytes].
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path
from typing import Any

import llama_cpp

from kvpsi.bench.conversation import Told, load, text_tokens
from kvpsi.bench.lines import say, until_closed
from kvpsi.engines.llama import GovernedLlama, govern
from kvpsi.engines.loading import LoadSettings, open_llama, show_errors_only
from kvpsi.errors import CacheRefusedError
from kvpsi.instrument import Instrument
from kvpsi.pressure import ScriptedSource, make_reading
from kvpsi.pressure.psi import parse_pressure

_POLL_S = 0.1
_AVG10_THRESHOLD = 0.10
_STEP = 0.20
PROMPT_TOKENS = 512


class Teller(Instrument):
    """Says when memory went back for want of it, not because a prompt was taken out again."""

    def event(self, name: str, value: Any) -> None:
        """A trim that returned something."""
        if name == "trim" and value.release.returned_bytes:
            say("gave", [time.monotonic(), value.release.returned_bytes])


def follow_avg10(governed: GovernedLlama, pressure_file: Path, ended: threading.Event) -> None:
    """Ten times a second: while the board's avg10 is over the threshold, a fifth of the cache goes."""
    cache = governed.cache
    while not ended.wait(_POLL_S):
        avg10 = parse_pressure(pressure_file.read_text()).some.avg10
        if avg10 >= _AVG10_THRESHOLD:
            cache.cap_cells = max(cache.floor_cells, int((1 - _STEP) * cache.used_cells))
            if cache.give_now() is None:
                cache.interrupt()


def _work(llm: llama_cpp.Llama, doing: str, ended: threading.Event) -> None:
    prompt = text_tokens(llm, PROMPT_TOKENS)
    depth = llm.n_tokens
    while not ended.is_set():
        if llm.n_tokens + PROMPT_TOKENS >= llm.n_ctx():
            llm.n_tokens = depth
        with contextlib.suppress(CacheRefusedError):
            llm.eval(prompt if doing == "reading" else [llm.sample(temp=0.0)])


def main(reactor: str, doing: str, argument: str, pressure_file: str) -> None:
    """Work; ``argument`` is what `Conversation.as_argument` gave, ``pressure_file`` where the board's stall is told."""
    told = Told.of(argument)
    show_errors_only()
    options = LoadSettings(n_ctx=told.conversation.n_ctx, n_threads=1)
    source = None if reactor == "kvpsi" else ScriptedSource([make_reading()])  # always calm
    with (
        contextlib.closing(open_llama(told.model, options.n_ctx, options)) as llm,
        govern(llm, source=source, instrument=Teller()) as governed,
    ):
        load(llm, governed, told.conversation)
        ended = until_closed()
        if reactor == "avg10":
            threading.Thread(target=follow_avg10, args=(governed, Path(pressure_file), ended), daemon=True).start()
        say("ready", True)
        _work(llm, doing, ended)


if __name__ == "__main__":
    main(*sys.argv[1:5])
