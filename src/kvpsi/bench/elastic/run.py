"""Stock llama-cpp-python beside the elastic cache, same settings, in one run: memory, speed, and the same logits."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from kvpsi.bench.conversation import text_tokens
from kvpsi.bench.elastic.worker import Kind, worker
from kvpsi.bench.figures import Figure
from kvpsi.engines.llama import GovernedLlama, govern
from kvpsi.engines.loading import LoadSettings, open_llama
from kvpsi.errors import UsageError
from kvpsi.kv import CacheSettings, Forgotten, pages

Report = Callable[[str], None]
_TOKENS_BEFORE_TRIM = 4096
_TOKENS_TO_TRIM = 3520
_TOKENS_AFTER_TRIM = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. ``rounds`` of decoding alternate in both orders, ``tokens`` each, from ``depth`` tokens on."""

    model: Path
    n_ctx: int = 16384
    n_threads: int = 0
    kv_type: str = "f16"
    rounds: int = 60
    tokens: int = 32
    depth: int = 512
    trims: int = 5

    def __post_init__(self) -> None:
        if self.n_ctx < _TOKENS_BEFORE_TRIM + 512:
            raise UsageError(f"The bench needs a context of at least {_TOKENS_BEFORE_TRIM + 512} tokens; raise -c.")
        if self.rounds < 2 or self.trims < 1 or self.tokens < 1:
            raise UsageError("The bench needs at least 2 rounds of decoding; raise --rounds.")

    @property
    def load(self) -> LoadSettings:
        """How both models are loaded."""
        return LoadSettings(n_ctx=self.n_ctx, n_threads=self.n_threads, kv_type=self.kv_type)


@dataclass(frozen=True, slots=True)
class Trimmed:
    """One trim: bytes in the trimmed blocks, bytes that the kernel counts less afterwards, how long it took.

    ``release_seconds`` is the part in which the pages were counted and given back, the rest went to choosing tokens
    and forgetting them; ``kernel_seconds`` what as many pages in as many ranges take without any of kvpsi, written
    before the tokens were read, as pages that the processor's caches no longer know take longer.
    """

    requested_bytes: int
    returned_bytes: int
    release_seconds: float
    total_seconds: float
    kernel_seconds: float


@contextlib.contextmanager
def _pair(
    plan: Plan, forget: Callable[[Forgotten], None] | None = None
) -> Iterator[tuple[llama_cpp.Llama, GovernedLlama]]:
    """A stock model, and a governed one."""
    with (
        contextlib.closing(open_llama(plan.model, plan.n_ctx, plan.load)) as stock,
        contextlib.closing(open_llama(plan.model, plan.n_ctx, plan.load)) as llm,
        govern(llm, cache_settings=CacheSettings(keep=16, tail=256)) as governed,
    ):
        governed.cache.on_forgotten = forget
        yield stock, governed


def memory_and_speed(plan: Plan, report: Report) -> tuple[dict[Kind, int], dict[Kind, list[float]]]:
    """Resident set when idle, and tokens a second in each round, of stock and elastic, each in a process of its own.

    Every round runs both, one at a time, and the order alternates. The elastic process's monitor is running all the
    time.
    """
    report("loading each once to see what it holds when idle")
    kinds: tuple[Kind, Kind] = ("stock", "elastic")
    speeds: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    with contextlib.ExitStack() as stack:
        workers = {kind: stack.enter_context(worker(kind, plan.model, plan.load)) for kind in kinds}
        for each in workers.values():
            each.read(plan.depth)
            each.decode_seconds(plan.tokens)
        for round_number in range(plan.rounds):
            report(f"decoding, round {round_number + 1} of {plan.rounds}")
            for kind in kinds if round_number % 2 == 0 else reversed(kinds):
                speeds[kind].append(plan.tokens / workers[kind].decode_seconds(plan.tokens))
        return {kind: each.idle_rss_bytes for kind, each in workers.items()}, speeds


@contextlib.contextmanager
def written_pages(n_bytes: int, n_ranges: int) -> Iterator[list[pages.Mapping]]:
    """So many bytes of written pages that are nobody's, in so many ranges with gaps between."""
    length = n_bytes // n_ranges // pages.PAGE_BYTES * pages.PAGE_BYTES
    stride = length + 16 * pages.PAGE_BYTES
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with contextlib.closing(mmap.mmap(-1, stride * n_ranges, flags=flags)) as area:
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        pages.forbid_huge_pages(pages.Mapping(base, base + stride * n_ranges))
        for i in range(n_ranges):
            for start in range(i * stride, i * stride + length, pages.PAGE_BYTES):
                area[start] = 1
        yield [pages.Mapping(base + i * stride, base + i * stride + length) for i in range(n_ranges)]


def _seconds_to_release(ranges: list[pages.Mapping]) -> float:
    started = time.perf_counter()
    pages.release(ranges)
    return time.perf_counter() - started


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
        prompt = refill = text_tokens(stock, _TOKENS_BEFORE_TRIM)
        n_ranges = 2 * llama_cpp.llama_model_n_layer(llm.model)
        for number in range(plan.trims):
            with written_pages(_TOKENS_TO_TRIM * cache.bytes_per_cell, n_ranges) as others:
                report(f"reading {len(refill)} tokens twice")
                stock.eval(refill)
                llm.eval(refill)
                report(f"trimming, {number + 1} of {plan.trims}")
                before = cache.resident_bytes()
                kernel = _seconds_to_release(others) if number % 2 else 0.0
                started = time.perf_counter()
                trim = cache.evict(_TOKENS_TO_TRIM)
                seconds = time.perf_counter() - started
                kernel = kernel or _seconds_to_release(others)
                returned = before - cache.resident_bytes()
            requested = trim.freed_cells * cache.bytes_per_cell
            trims.append(Trimmed(requested, returned, trim.release.seconds, seconds, kernel))
            for f in forgotten:
                llama_cpp.llama_memory_seq_rm(memory, f.seq_id, f.first_pos, f.end_pos)
            forgotten.clear()
            for token in prompt[:_TOKENS_AFTER_TRIM]:
                stock.eval([token])
                llm.eval([token])
                identical = identical and bool(np.array_equal(_logits(stock), _logits(llm)))
            refill = text_tokens(stock, trim.freed_cells)
            first = int(llama_cpp.llama_memory_seq_pos_max(memory, 0)) + 1
            if first + len(refill) + _TOKENS_AFTER_TRIM > plan.n_ctx:
                stock.n_tokens = llm.n_tokens = 0
                refill = prompt
    return trims, identical


def _standard_error(values: Sequence[float]) -> float:
    """Of the mean of several measurements."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def run(plan: Plan, report: Report) -> dict[str, Any]:
    """The whole bench as one JSON-ready document."""
    idle_rss_bytes, speeds = memory_and_speed(plan, report)
    trims, identical = trim_and_compare(plan, report)
    requested = sum(t.requested_bytes for t in trims)
    returned = sum(t.returned_bytes for t in trims)
    ratios = [e / s for s, e in zip(speeds["stock"], speeds["elastic"], strict=True)]
    over_kernel = statistics.median(t.release_seconds / t.kernel_seconds for t in trims)
    figures = [
        Figure("idle_rss_ratio", idle_rss_bytes["elastic"] / idle_rss_bytes["stock"], "", 0.33, "<="),
        Figure("trim_returned_share", returned / requested, "", 0.95, ">="),
        Figure("trim_speed", _speed_gb_s(trims, lambda t: t.release_seconds), "GB/s", 10.0, ">="),
        Figure("trim_speed_with_choosing", _speed_gb_s(trims, lambda t: t.total_seconds), "GB/s"),
        Figure("kernel_alone_speed", _speed_gb_s(trims, lambda t: t.kernel_seconds), "GB/s"),
        Figure("trim_time_over_kernel_alone", over_kernel, ""),
        Figure("decode_speed_ratio", statistics.median(ratios), "", 0.99, ">="),
        Figure("decode_speed_ratio_standard_error", _standard_error(ratios), ""),
        Figure("logits_identical", identical, "", True, "=="),
    ]
    return {
        "model": plan.model.name,
        "n_ctx": plan.n_ctx,
        "kv_type": plan.kv_type,
        "stock.idle_rss_bytes": idle_rss_bytes["stock"],
        "elastic.idle_rss_bytes": idle_rss_bytes["elastic"],
        "stock.decode_tok_s": statistics.median(speeds["stock"]),
        "elastic.decode_tok_s": statistics.median(speeds["elastic"]),
        "trim.requested_bytes": requested,
        "trim.returned_bytes": returned,
        "trim.seconds": sum(t.release_seconds for t in trims),
        "trim.total_seconds": sum(t.total_seconds for t in trims),
        "logits_identical": identical,
        "figures": [f.as_json() for f in figures],
        "raw": {
            "stock.decode_tok_s": speeds["stock"],
            "elastic.decode_tok_s": speeds["elastic"],
            "trims": [asdict(t) for t in trims],
        },
    }


def _speed_gb_s(trims: list[Trimmed], seconds: Callable[[Trimmed], float]) -> float:
    return statistics.median(t.returned_bytes / seconds(t) for t in trims) / 1e9
