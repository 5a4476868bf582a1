"""The process of one model: it loads its conversation, and generates until its standard input is closed.

It writes JSON lines: ``ready`` with its resident set, and ``done`` with what it did.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any

import llama_cpp

from kvpsi.bench.conversation import Told, load
from kvpsi.bench.lines import say, until_closed
from kvpsi.engines.llama import GovernedLlama, govern
from kvpsi.engines.loading import LoadSettings, open_llama, show_errors_only
from kvpsi.errors import CacheRefusedError
from kvpsi.kv.pages import process_rss_bytes

_RETRY_S = 0.05
_GOVERNED = {"kvpsi": True, "fixed": False}


def _generate(llm: llama_cpp.Llama, ended: threading.Event) -> tuple[list[float], int]:
    """Seconds of each token, and how often room for one was refused."""
    seconds: list[float] = []
    refused = 0
    while not ended.is_set() and llm.n_tokens < llm.n_ctx() - 1:
        began = time.monotonic()
        try:
            llm.eval([llm.sample(temp=0.0)])
        except CacheRefusedError:
            refused += 1
            ended.wait(_RETRY_S)
            continue
        seconds.append(time.monotonic() - began)
    ended.wait()
    return seconds, refused


def _report(seconds: list[float], refused: int, governed: GovernedLlama | None) -> dict[str, Any]:
    summary = governed.summary() if governed else None
    return {
        "seconds": seconds,
        "refused": refused,
        "trims": summary.trims if summary else 0,
        "trusted": summary.trusted if summary else True,
    }


def main(variant: str, argument: str) -> None:
    """Play one model; ``argument`` is what `Conversation.as_argument` gave."""
    told = Told.of(argument)
    show_errors_only()
    options = LoadSettings(n_ctx=told.conversation.n_ctx, n_threads=1)
    with contextlib.closing(open_llama(told.model, options.n_ctx, options)) as llm:
        governed = govern(llm) if _GOVERNED[variant] else None
        with governed or contextlib.nullcontext():
            load(llm, governed, told.conversation)
            say("ready", process_rss_bytes())
            seconds, refused = _generate(llm, until_closed())
            say("done", _report(seconds, refused, governed))


if __name__ == "__main__":
    main(*sys.argv[1:3])
