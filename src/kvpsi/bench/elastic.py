"""Stock llama-cpp-python beside the elastic cache, same settings, in one run: memory, speed, and the same logits."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

from kvpsi.bench.figures import Figure
from kvpsi.engines.llama import GovernedLlama, govern
from kvpsi.engines.loading import LoadSettings, open_llama
from kvpsi.errors import UsageError
from kvpsi.kv import CacheSettings, Forgotten

Report = Callable[[str], None]
_TOKENS_BEFORE_TRIM = 4096
_TOKENS_TO_TRIM = 3520
_TOKENS_AFTER_TRIM = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. ``rounds`` of decoding alternate in both orders, ``tokens`` each, at ``depth`` tokens."""

    model: Path
    n_ctx: int = 16384
    n_threads: int = 0
    kv_type: str = "f16"
    rounds: int = 10
    tokens: int = 64
    depth: int = 512
    trims: int = 5

    def __post_init__(self) -> None:
        if self.n_ctx < _TOKENS_BEFORE_TRIM + 512:
            raise UsageError(f"The bench needs a context of at least {_TOKENS_BEFORE_TRIM + 512} tokens; raise -c.")
        if self.rounds < 2 or self.trims < 1 or self.tokens < 1:
            raise UsageError("The bench needs at least 2 rounds, 1 trim and 1 token.")


@dataclass(frozen=True, slots=True)
class Trimmed:
    """One trim: bytes in the trimmed blocks, bytes that the kernel counts less afterwards, how long it took."""

    requested_bytes: int
    returned_bytes: int
    seconds: float


def idle_rss_bytes(plan: Plan, kind: str) -> int:
    """Resident set of a fresh process that has opened the model and waits."""
    command = [sys.executable, "-m", "kvpsi.bench.idle", kind, str(plan.model), str(plan.n_ctx)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return int(json.loads(done.stdout.splitlines()[-1])["rss_bytes"])


@contextlib.contextmanager
def _pair(
    plan: Plan, forget: Callable[[Forgotten], None] | None = None
) -> Iterator[tuple[llama_cpp.Llama, GovernedLlama]]:
    """A stock model, and a governed one."""
    load = LoadSettings(n_ctx=plan.n_ctx, n_threads=plan.n_threads, kv_type=plan.kv_type)
    with (
        contextlib.closing(open_llama(plan.model, plan.n_ctx, load)) as stock,
        contextlib.closing(open_llama(plan.model, plan.n_ctx, load)) as llm,
        govern(llm, cache_settings=CacheSettings(keep=16, tail=256)) as governed,
    ):
        governed.cache.on_forgotten = forget
        yield stock, governed


def _text_tokens(llm: llama_cpp.Llama, count: int) -> list[int]:
    """Ordinary token ids, the same for both models."""
    n_vocab = llm.n_vocab()
    return [int(t) for t in np.random.default_rng(7).integers(n_vocab // 4, n_vocab // 2, count)]


def _decode_seconds(llm: llama_cpp.Llama, plan: Plan, tokens: list[int]) -> float:
    """Time of decoding one token after the other through the public API, at the same depth each time."""
    llm.n_tokens = plan.depth
    llm.eval(tokens[:1])
    started = time.perf_counter()
    for token in tokens[1:]:
        llm.eval([token])
    return time.perf_counter() - started


def decode_speeds(plan: Plan, report: Report) -> tuple[list[float], list[float]]:
    """Tokens a second of stock and elastic in each round; every round runs both, the order alternates."""
    with _pair(plan) as (stock, governed):
        prompt, tokens = _text_tokens(stock, plan.depth), _text_tokens(stock, plan.tokens + 1)
        for llm in (stock, governed.llm):
            llm.eval(prompt)
            _decode_seconds(llm, plan, tokens)
        speeds: dict[int, list[float]] = {0: [], 1: []}
        both = (stock, governed.llm)
        for round_number in range(plan.rounds):
            report(f"decoding, round {round_number + 1} of {plan.rounds}")
            for which in (0, 1) if round_number % 2 == 0 else (1, 0):
                speeds[which].append(plan.tokens / _decode_seconds(both[which], plan, tokens))
    return speeds[0], speeds[1]


def _logits(llm: llama_cpp.Llama) -> npt.NDArray[np.uint32]:
    pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
    bits: npt.NDArray[np.uint32] = np.ctypeslib.as_array(pointer, (llm.n_vocab(),)).copy().view(np.uint32)
    return bits


def trim_and_compare(plan: Plan, report: Report) -> tuple[list[Trimmed], bool]:
    """Trim a filled cache several times; stock removes the same positions without giving anything back."""
    forgotten: list[Forgotten] = []
    trims = []
    identical = True
    with _pair(plan, forgotten.append) as (stock, governed):
        memory, cache, llm = llama_cpp.llama_get_memory(stock.ctx), governed.cache, governed.llm
        prompt = _text_tokens(stock, _TOKENS_BEFORE_TRIM)
        report(f"reading {_TOKENS_BEFORE_TRIM} tokens twice")
        stock.eval(prompt)
        llm.eval(prompt)
        for number in range(plan.trims):
            report(f"trim {number + 1} of {plan.trims}")
            before = cache.resident_bytes()
            started = time.perf_counter()
            trim = cache.evict(_TOKENS_TO_TRIM)
            seconds = time.perf_counter() - started
            requested = trim.freed_cells * cache.bytes_per_cell
            trims.append(Trimmed(requested, before - cache.resident_bytes(), seconds))
            for f in forgotten:
                llama_cpp.llama_memory_seq_rm(memory, f.seq_id, f.first_pos, f.end_pos)
            forgotten.clear()
            for token in prompt[:_TOKENS_AFTER_TRIM]:
                stock.eval([token])
                llm.eval([token])
                identical = identical and bool(np.array_equal(_logits(stock), _logits(llm)))
            if number + 1 < plan.trims:
                refill = _text_tokens(stock, trim.freed_cells)
                first = int(llama_cpp.llama_memory_seq_pos_max(memory, 0)) + 1
                if first + len(refill) + _TOKENS_AFTER_TRIM > plan.n_ctx:
                    stock.n_tokens = llm.n_tokens = 0
                    refill = prompt
                stock.eval(refill)
                llm.eval(refill)
    return trims, identical


def run(plan: Plan, report: Report) -> dict[str, object]:
    """The whole bench as one JSON-ready document."""
    report("loading each once to see what it holds when idle")
    stock_rss, elastic_rss = idle_rss_bytes(plan, "stock"), idle_rss_bytes(plan, "elastic")
    stock_speeds, elastic_speeds = decode_speeds(plan, report)
    trims, identical = trim_and_compare(plan, report)
    requested = sum(t.requested_bytes for t in trims)
    returned = sum(t.returned_bytes for t in trims)
    seconds = sum(t.seconds for t in trims)
    stock_speed, elastic_speed = statistics.median(stock_speeds), statistics.median(elastic_speeds)
    speed_ratio = statistics.median(e / s for s, e in zip(stock_speeds, elastic_speeds, strict=True))
    bytes_per_second = statistics.median(t.returned_bytes / t.seconds for t in trims)
    figures = [
        Figure("idle_rss_ratio", elastic_rss / stock_rss, "", 0.33, "<="),
        Figure("trim_returned_share", returned / requested, "", 0.95, ">="),
        Figure("trim_speed", bytes_per_second / 1e9, "GB/s", 10.0, ">="),
        Figure("decode_speed_ratio", speed_ratio, "", 0.99, ">="),
        Figure("logits_identical", identical, "", True, "=="),
    ]
    return {
        "model": plan.model.name,
        "n_ctx": plan.n_ctx,
        "kv_type": plan.kv_type,
        "stock.idle_rss_bytes": stock_rss,
        "elastic.idle_rss_bytes": elastic_rss,
        "stock.decode_tok_s": stock_speed,
        "elastic.decode_tok_s": elastic_speed,
        "trim.requested_bytes": requested,
        "trim.returned_bytes": returned,
        "trim.seconds": seconds,
        "logits_identical": identical,
        "figures": [f.as_json() for f in figures],
        "raw": {
            "stock.decode_tok_s": stock_speeds,
            "elastic.decode_tok_s": elastic_speeds,
            "trims": [
                {"requested_bytes": t.requested_bytes, "returned_bytes": t.returned_bytes, "seconds": t.seconds}
                for t in trims
            ],
        },
    }
