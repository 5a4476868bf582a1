"""The process of one model: it loads its conversation and generates, calm first and then on.

It writes JSON lines to standard output: ``calm`` and, beside the neighbour, ``tokens`` every few tokens, ``pressure``
when the neighbour may begin, ``generated`` when all tokens are there, ``reading_pressed`` when it has read beside the
neighbour, ``alone`` when that is to end (it then waits for a line on standard input), ``tokens_alone`` and
``reading_alone`` when it has generated and read as much again, and ``done`` at the end. Times are CLOCK_MONOTONIC,
which all processes share.
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

from kvpsi.bench.conversation import Told, load, text_tokens
from kvpsi.bench.lines import say
from kvpsi.bench.pressure.prune import Pruner
from kvpsi.bench.pressure.weights import Populator
from kvpsi.engines.llama import GovernedLlama, govern
from kvpsi.engines.loading import LoadSettings, open_llama, show_errors_only
from kvpsi.kv import CacheSettings

_TELL_EVERY_TOKENS = 8
_SETTLE_S = 3.0  # until the governor takes it for calm again


class Subject:
    """One model in one variant."""

    def __init__(self, llm: llama_cpp.Llama, model: Path, variant: str, settings: dict[str, Any]) -> None:
        self.llm = llm
        self.cell_bytes = 0
        self.governed: GovernedLlama | None = None
        self.pruner: Pruner | None = None
        keep, tail, min_prune = settings["keep"], settings["tail"], settings["min_prune"]
        if variant == "calm" or variant.startswith("kvpsi"):
            instrument = Populator(model) if variant == "kvpsi-populated" else None
            self.governed = govern(llm, cache_settings=CacheSettings(keep, tail, min_prune), instrument=instrument)
        elif variant == "prune":
            self.pruner = Pruner(
                llm,
                Path(settings["pressure_file"]),
                threshold=settings["prune_threshold"],
                keep=keep,
                tail=tail,
                min_prune=min_prune,
            )

    def kv_cells(self) -> int:
        """Cells whose memory is committed."""
        return self.governed.cache.committed_cells if self.governed else self.llm.n_ctx()

    def prunes(self) -> int:
        """How often tokens were dropped."""
        if self.governed:
            return self.governed.cache.trims
        return self.pruner.prunes if self.pruner else 0

    def gave(self) -> int:
        """A number that changes when memory is given back, or tokens are dropped."""
        return self.prunes() + (self.governed.cache.releases if self.governed else 0)

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

    def read(self, count: int) -> dict[str, float]:
        """Read a prompt; how long it took in seconds, and how often it had to be stopped for room."""
        assert self.governed is not None
        interrupts, began = self.governed.cache.interrupts, time.monotonic()
        self.llm.eval(text_tokens(self.llm, count))
        return {"seconds": time.monotonic() - began, "interrupts": self.governed.cache.interrupts - interrupts}

    def keep_as_small(self) -> None:
        """Let the cache hold no more cells than now, though there is room."""
        assert self.governed is not None
        self.governed.cache.cap_cells = self.governed.cache.used_cells


def major_faults() -> int:
    """Pages that this process had to wait for until they were read from a disk or from swap."""
    import resource  # on Unix only, as are boards

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def main(variant: str, argument: str, more: str) -> None:
    """Play one variant.

    Args:
        variant: one of `kvpsi.bench.pressure.plan.Variant`.
        argument: what `Conversation.as_argument` gave.
        more: a JSON object, see `kvpsi.bench.pressure.play`.
    """
    told, settings = Told.of(argument), json.loads(more)
    show_errors_only()
    locked = variant == "kvpsi-locked"
    options = LoadSettings(told.conversation.n_ctx, settings["n_threads"], lock_weights=locked)
    with contextlib.closing(open_llama(told.model, options.n_ctx, options)) as llm:
        subject = Subject(llm, told.model, variant, settings)
        with subject.governed or contextlib.nullcontext():
            load(llm, subject.governed, told.conversation)
            forever = time.monotonic() + 3600
            subject.generate(settings["calm_tokens"], forever, lambda tokens: say("calm", tokens))
            say("pressure", time.monotonic())
            prunes, faults = subject.prunes(), major_faults()
            limit = time.monotonic() + settings["limit_s"]
            subject.generate(settings["n_predict"], limit, lambda tokens: say("tokens", tokens))
            prunes, faults = subject.prunes() - prunes, major_faults() - faults
            say("generated", time.monotonic())
            if subject.governed and variant != "calm":
                if settings["read_tokens"]:
                    say("reading_pressed", subject.read(settings["read_tokens"]))
                subject.keep_as_small()
                say("alone", time.monotonic())
                sys.stdin.readline()
                time.sleep(_SETTLE_S)
                limit = time.monotonic() + settings["limit_s"]
                subject.generate(settings["n_predict"], limit, lambda tokens: say("tokens_alone", tokens))
                if settings["read_tokens"]:
                    say("reading_alone", subject.read(settings["read_tokens"]))
            trusted = subject.governed is None or subject.governed.cache.trusted
            say("done", {"major_faults": faults, "prunes": prunes, "trusted": trusted})


if __name__ == "__main__":
    main(*sys.argv[1:4])
