"""The process of one model: it reads a prompt, says so, and generates, calm first and then on.

It writes JSON lines to standard output: ``read`` once the prompt is read, ``pressure`` when the neighbour may begin,
``tokens`` every few tokens, ``done`` at the end. Times are CLOCK_MONOTONIC, which all processes share.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp

from kvpsi.bench.pressure.prune import Pruner
from kvpsi.bench.worker import text_tokens
from kvpsi.engines.llama import GovernedLlama, govern
from kvpsi.engines.loading import LoadSettings, open_llama, show_errors_only
from kvpsi.kv import CacheSettings

_TELL_EVERY_TOKENS = 8


class Subject:
    """One model in one variant."""

    def __init__(self, llm: llama_cpp.Llama, variant: str, settings: dict[str, Any]) -> None:
        self.llm = llm
        self.cell_bytes = 0
        self.governed: GovernedLlama | None = None
        self.pruner: Pruner | None = None
        keep, tail, min_prune = settings["keep"], settings["tail"], settings["min_prune"]
        if variant in ("kvpsi", "calm"):
            self.governed = govern(llm, cache_settings=CacheSettings(keep, tail, min_prune))
        elif variant == "prune":
            self.pruner = Pruner(llm, threshold=settings["prune_threshold"], keep=keep, tail=tail, min_prune=min_prune)

    def kv_cells(self) -> int:
        """Cells whose memory is committed."""
        return self.governed.cache.committed_cells if self.governed else self.llm.n_ctx()

    def gave(self) -> int:
        """A number that changes when memory is given back, or tokens are dropped."""
        if self.governed:
            return self.governed.cache.releases + self.governed.cache.trims
        return self.pruner.prunes if self.pruner else 0

    def generate(self, count: int, until_s: float, tell: Callable[[list[list[float]]], None]) -> None:
        """Generate, greedily, and tell of each token: when, how long in seconds, whether memory was given, KV cells."""
        told: list[list[float]] = []
        for _ in range(count):
            began, gave = time.monotonic(), self.gave()
            if self.pruner:
                self.pruner.look()
            self.llm.eval([self.llm.sample(temp=0.0)])
            now = time.monotonic()
            told.append([now, now - began, float(self.gave() != gave), self.kv_cells()])
            if len(told) == _TELL_EVERY_TOKENS or now > until_s:
                tell(told)
                told = []
            if now > until_s:
                break
        if told:
            tell(told)


def say(what: str, value: object) -> None:
    """One line for the parent."""
    print(json.dumps({what: value}), flush=True)


def main(variant: str, argument: str) -> None:
    """Play one variant; ``argument`` is a JSON object, see `kvpsi.bench.pressure.play`."""
    import resource  # on Unix only, as are boards

    settings = json.loads(argument)
    show_errors_only()
    load = LoadSettings(n_ctx=settings["n_ctx"], n_threads=settings["n_threads"])
    with contextlib.closing(open_llama(Path(settings["model"]), load.n_ctx, load)) as llm:
        subject = Subject(llm, variant, settings)
        with subject.governed or contextlib.nullcontext():
            began = time.monotonic()
            llm.eval(text_tokens(llm, settings["prompt_tokens"]))
            say("read", time.monotonic() - began)
            forever = time.monotonic() + 3600
            subject.generate(settings["n_predict"], forever, lambda told: say("calm", told))
            say("pressure", time.monotonic())
            limit = time.monotonic() + settings["limit_s"]
            subject.generate(settings["n_predict"], limit, lambda told: say("tokens", told))
            usage = resource.getrusage(resource.RUSAGE_SELF)
            summary = subject.governed.summary() if subject.governed else None
            say(
                "done",
                {
                    "peak_rss_bytes": usage.ru_maxrss * 1024,
                    "major_faults": usage.ru_majflt,
                    "prunes": subject.pruner.prunes if subject.pruner else summary.trims if summary else 0,
                    "final_kv_cells": subject.kv_cells(),
                    "returned_bytes": summary.returned_bytes if summary else 0,
                    "trusted": summary.trusted if summary else True,
                },
            )


if __name__ == "__main__":
    main(*sys.argv[1:3])
