"""The elastic cache on real contexts: what the kernel, llama.cpp's graph and its saved state say must agree with it."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import random
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from contexts import Shape, batch_of, logits, open_context, open_model
from truth import WrittenCells

from kvpsi.errors import CacheRefusedError, LayoutError, UsageError
from kvpsi.instrument import Instrument
from kvpsi.kv import pages
from kvpsi.kv.elastic import CacheSettings, ElasticCache, Forgotten, _shares
from kvpsi.kv.layout import seq_state
from kvpsi.kv.policies import EvictionPolicy
from kvpsi.kv.policies.base import CellView, FloatArray
from kvpsi.kv.statedata import parse_state

pytestmark = pytest.mark.engine

SETTINGS = CacheSettings(keep=4, tail=16, min_prune=16)
SMALL = Shape(n_ctx=512, n_seq=1, n_batch=512, n_ubatch=64)


class Recorder(Instrument):
    def __init__(self) -> None:
        self.events: list[tuple[str, Any, float]] = []

    def event(self, name: str, value: Any) -> None:
        self.events.append((name, value, time.monotonic()))

    def named(self, name: str) -> list[Any]:
        return [value for each, value, _ in self.events if each == name]


@pytest.fixture(scope="module")
def model(default_model: Path) -> Iterator[llama_cpp.llama_model_p]:
    with open_model(default_model) as opened:
        yield opened


@pytest.fixture(scope="module")
def gemma(gemma_model: Path) -> Iterator[llama_cpp.llama_model_p]:
    with open_model(gemma_model) as opened:
        yield opened


@contextlib.contextmanager
def elastic(model: llama_cpp.llama_model_p, shape: Shape = SMALL, **options: Any) -> Iterator[ElasticCache]:
    options.setdefault("settings", SETTINGS)
    with open_context(model, shape, change=options.pop("change", lambda _: None)) as ctx:
        cache = ElasticCache(ctx, **options)
        try:
            yield cache
        finally:
            cache.close()


def text(count: int, start: int = 0, seq_id: int = 0) -> list[tuple[int, int, int]]:
    return [(100 + (31 * (start + i) + 977 * seq_id) % 40000, start + i, seq_id) for i in range(count)]


def decode(cache: ElasticCache, tokens: list[tuple[int, int, int]], *, divisible: bool = False) -> int:
    with batch_of(tokens) as batch:
        return cache.decode(batch, divisible=divisible)


def held(ctx: llama_cpp.llama_context_p, seq_id: int = 0) -> list[int]:
    """The positions that llama.cpp itself says a sequence has."""
    return sorted(parse_state(seq_state(ctx, seq_id))[0].positions)


# -- finding the tensors --------------------------------------------------------------------------------------------

SHAPES = {
    "f16": SMALL,
    "q8_0": replace(SMALL, kv_type=llama_cpp.GGML_TYPE_Q8_0),
    "unified": replace(SMALL, n_seq=4),
    "streams": replace(SMALL, n_seq=4, unified=False, n_ctx=1024),
    "streams-q8_0": replace(SMALL, n_seq=2, unified=False, kv_type=llama_cpp.GGML_TYPE_Q8_0),
    "no-flash": replace(SMALL, flash=False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_discovery_finds_all_of_the_cache_and_leaves_it_empty(model: llama_cpp.llama_model_p, name: str) -> None:
    shape = SHAPES[name]
    with elastic(model, shape) as cache:
        (section,) = [t.section for t in cache.trackers]
        assert section.n_stream == (1 if shape.unified else shape.n_seq)
        assert cache.n_cells == shape.n_ctx
        assert cache.capacity_bytes == section.extent.n_bytes == cache.n_cells * cache.bytes_per_cell
        values = {llama_cpp.GGML_TYPE_F16: 2.0, llama_cpp.GGML_TYPE_Q8_0: 34 / 32}[shape.kv_type]
        assert cache.bytes_per_cell == 30 * 2 * 3 * 64 * values  # layers, K and V, heads, dimensions
        assert cache.used_cells == 0 and cache.trusted
        for seq_id in range(shape.n_seq):
            assert llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(cache.ctx), seq_id) == -1
        assert cache.resident_bytes() < 0.05 * cache.capacity_bytes, "an empty cache costs next to nothing"


def test_the_saved_rows_lie_where_the_planes_say(model: llama_cpp.llama_model_p) -> None:
    shape = SHAPES["streams"]
    with elastic(model, shape) as cache:
        assert decode(cache, text(5, seq_id=2)) == 0
        section = cache.trackers[0].section
        (state,) = parse_state(seq_state(cache.ctx, 2))
        tensors = [rows for pair in zip(state.keys, state.values, strict=True) for rows in pair]
        for plane, rows in zip(section.planes[2], tensors, strict=True):
            assert ctypes.string_at(plane.base, 5 * plane.bytes_per_cell) == rows.data


def test_contexts_that_were_freed_are_not_mistaken_for_the_living_one(model: llama_cpp.llama_model_p) -> None:
    for n_ctx in (512, 256, 512, 512):
        with open_context(model, replace(SMALL, n_ctx=n_ctx)) as ctx, batch_of(text(8)) as batch:
            assert llama_cpp.llama_decode(ctx, batch) == 0
        with elastic(model, replace(SMALL, n_ctx=n_ctx)) as cache:
            assert cache.n_cells == n_ctx
            assert decode(cache, text(40)) == 0
            assert cache.trusted and held(cache.ctx) == list(range(40))


def test_two_living_contexts_do_not_touch_each_other(model: llama_cpp.llama_model_p) -> None:
    with elastic(model) as first:
        assert decode(first, text(64)) == 0
        state = seq_state(first.ctx, 0)
        with elastic(model) as second:
            a, b = (c.trackers[0].section.extent for c in (first, second))
            assert a.end <= b.start or b.end <= a.start
            assert decode(second, text(64)) == 0
            second.clear()
        assert seq_state(first.ctx, 0) == state


def test_a_context_without_a_cache_of_cells_is_left_alone(
    model: llama_cpp.llama_model_p, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpsi.kv.layout.pages.anonymous_mappings", list)
    with open_context(model, SMALL) as ctx:
        with pytest.raises(LayoutError, match="not found"):
            ElasticCache(ctx)
        with batch_of(text(8)) as batch:
            assert llama_cpp.llama_decode(ctx, batch) == 0
        assert held(ctx) == list(range(8))


# -- memory really goes back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", [llama_cpp.GGML_TYPE_F16, llama_cpp.GGML_TYPE_Q8_0])
def test_what_is_evicted_goes_back_as_the_kernel_counts(model: llama_cpp.llama_model_p, kv_type: int) -> None:
    shape = replace(SMALL, n_ctx=1024, kv_type=kv_type, n_ubatch=256)
    with elastic(model, shape) as cache:
        assert decode(cache, text(500)) == 0
        per_cell = cache.bytes_per_cell
        full = cache.resident_bytes()
        # at most one page at either end of each tensor is resident beyond the cells in use
        assert 500 * per_cell * 0.99 <= full <= 500 * per_cell + 2 * 60 * pages.PAGE_BYTES
        rss = pages.process_rss_bytes()
        trim = cache.evict(2 * cache.block_cells)
        assert trim.freed_cells >= 2 * cache.block_cells - 4, "whole blocks, but for the protected start"
        given = full - cache.resident_bytes()
        whole_blocks = (trim.freed_cells // cache.block_cells) * cache.block_cells
        assert given >= 0.95 * whole_blocks * per_cell
        assert given <= trim.freed_cells * per_cell
        assert trim.release.returned_bytes == pytest.approx(given, rel=0.02)
        assert rss - pages.process_rss_bytes() >= 0.8 * given
        cache.clear()
        assert cache.resident_bytes() <= 2 * 60 * pages.PAGE_BYTES
        assert decode(cache, text(100)) == 0
        assert cache.resident_bytes() >= 100 * per_cell * 0.99, "taken again on demand"
        assert cache.trusted


def test_removing_a_range_gives_it_back_at_once(model: llama_cpp.llama_model_p) -> None:
    with elastic(model) as cache:
        assert decode(cache, text(400)) == 0
        before = cache.resident_bytes()
        assert cache.seq_rm(0, 100, 350)
        assert before - cache.resident_bytes() >= 0.8 * 250 * cache.bytes_per_cell
        assert held(cache.ctx) == [*range(100), *range(350, 400)]
        assert cache.release_slack().requested_bytes == 0, "nothing is given twice"


# -- the truth about cells ------------------------------------------------------------------------------------------


def watch_commits(cache: ElasticCache) -> list[list[list[int]]]:
    """For each of the cache's trackers, the cells of each micro-batch that the mirror recorded."""
    recorded: list[list[list[int]]] = []
    for tracker in cache.trackers:
        mine: list[list[int]] = []
        recorded.append(mine)

        def commit(tokens: Any, placements: Any, *, _tracker: Any = tracker, _mine: Any = mine) -> None:
            n_cells = _tracker.section.n_cells
            _mine.append([p.stream * n_cells + c for p in placements for c in p.cells.tolist()])
            type(_tracker).commit(_tracker, tokens, placements)

        tracker.commit = commit
    return recorded


@pytest.mark.parametrize(
    ("which", "shape"),
    [
        ("default", Shape(n_ctx=256, n_seq=3, n_batch=64, n_ubatch=16)),
        ("default", Shape(n_ctx=768, n_seq=3, n_batch=64, n_ubatch=16, unified=False)),
        ("gemma", Shape(n_ctx=1280, n_seq=1, n_batch=256, n_ubatch=128)),
        ("gemma", Shape(n_ctx=1280, n_seq=2, n_batch=256, n_ubatch=64)),
        ("gemma", Shape(n_ctx=1280, n_seq=2, n_batch=128, n_ubatch=64, unified=False)),
    ],
    ids=["unified", "streams", "window", "window-unified", "window-streams"],
)
def test_every_predicted_cell_is_the_one_that_llama_cpp_wrote(
    request: pytest.FixtureRequest, which: str, shape: Shape
) -> None:
    model = request.getfixturevalue("gemma" if which == "gemma" else "model")
    layers = (5, 0) if which == "gemma" else (0,)  # in gemma3 each sixth layer sees everything
    truth = WrittenCells(layers)
    rng = random.Random(f"{which} {shape}")
    most = shape.n_batch // shape.n_seq
    with elastic(model, shape, change=truth.put_into) as cache:
        recorded = watch_commits(cache)
        for layer in layers:
            truth.take(layer)  # what was probed
        memory = llama_cpp.llama_get_memory(cache.ctx)
        cells = 0
        for step in range(36 if which == "default" else 14):
            action = rng.random()
            seq_id = rng.randrange(shape.n_seq)
            if action < 0.12:
                first = rng.randrange(0, 200)
                cache.seq_rm(seq_id, first, first + rng.randrange(1, 100))
            elif action < 0.16:
                cache.seq_rm(seq_id, -1, -1)
            elif action < 0.20:
                cache.evict(rng.randrange(1, 100))
            elif action < 0.22 and which == "default":
                cache.clear()
            tokens = []
            for s in range(shape.n_seq):
                start = llama_cpp.llama_memory_seq_pos_max(memory, s) + 1
                tokens += text(rng.choice([0, 1, 1, rng.randrange(most), most]), start, s)
            if not tokens:
                continue
            if rng.random() < 0.5:
                rng.shuffle(tokens)
                tokens.sort(key=lambda t: t[1])
            code = decode(cache, tokens)
            if code == 1:
                assert cache.trusted, "it was foreseen"
                cache.seq_rm(seq_id, -1, -1)
                continue
            assert code == 0
            alone = rng.randrange(shape.n_seq)
            for _ in range(rng.choice([0, 0, 5, 70])):
                start = llama_cpp.llama_memory_seq_pos_max(memory, alone) + 1
                if code == 0:
                    code = decode(cache, text(1, start, alone))
            with cache.exclusively():
                assert cache.distrust_reason is None, f"step {step}"
            for layer, mine in zip(layers, recorded, strict=True):
                real = truth.take(layer)
                # tokens that came one by one are recorded together
                assert list(chain(*mine)) == list(chain(*real)), f"step {step}, layer {layer}"
                cells += sum(map(len, real))
                mine.clear()
        assert cells > 400


def test_single_tokens_with_and_without_positions_follow_each_other(model: llama_cpp.llama_model_p) -> None:
    with elastic(model) as cache:
        for pos in range(12):
            if pos % 3 == 0:  # llama.cpp chooses the position
                token = (llama_cpp.llama_token * 1)(1000 + pos)
                assert cache.decode(llama_cpp.llama_batch_get_one(token, 1)) == 0
            else:
                assert decode(cache, text(1, pos)) == 0
        with cache.exclusively():
            assert cache.trusted and cache.used_cells == 12
            assert cache.trackers[0].mirror.streams[0].pos[:13].tolist() == [*range(12), -1]


def test_a_policy_cannot_change_the_record(model: llama_cpp.llama_model_p) -> None:
    class Careless(EvictionPolicy):
        def score(self, view: CellView) -> FloatArray:
            view.pos[:] = -1
            return np.zeros(len(view.pos))

    with elastic(model) as cache:
        assert decode(cache, text(60, 0)) == 0
        cache.settings, cache.policy = CacheSettings(keep=4, tail=8, min_prune=8), Careless()
        with pytest.raises(ValueError, match="read-only"):
            cache.evict(16)
        assert held(cache.ctx) == [*range(60)]


def test_a_window_is_really_overwritten_in_the_test_above(gemma: llama_cpp.llama_model_p) -> None:
    with elastic(gemma, Shape(n_ctx=1280, n_seq=1, n_batch=256, n_ubatch=256)) as cache:
        for start in range(0, 1024, 256):
            assert decode(cache, text(256, start)) == 0
        base, window = cache.trackers
        assert base.mirror.used == 1024 and window.section.n_cells < 1024
        assert window.mirror.streams[0].pos_min(0) > 0
        assert cache.trusted


# -- changes behind its back ----------------------------------------------------------------------------------------


def count_releases(monkeypatch: pytest.MonkeyPatch) -> list[pages.Mapping]:
    seen: list[pages.Mapping] = []
    real = pages.release

    def release(span: pages.Mapping) -> None:
        seen.append(span)
        real(span)

    monkeypatch.setattr(pages, "release", release)
    return seen


@pytest.mark.parametrize("change", ["end cut off", "start cut off", "more decoded", "cleared"])
def test_a_change_behind_its_back_stops_releasing_until_cleared(
    model: llama_cpp.llama_model_p, change: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Recorder()
    with elastic(model, replace(SMALL, n_seq=2), instrument=seen) as cache:
        memory = llama_cpp.llama_get_memory(cache.ctx)
        assert decode(cache, text(200)) == 0
        assert decode(cache, text(200, seq_id=1)) == 0
        if change == "end cut off":
            assert llama_cpp.llama_memory_seq_rm(memory, 0, 150, -1)
        elif change == "start cut off":
            assert llama_cpp.llama_memory_seq_rm(memory, 0, 0, 50)
        elif change == "more decoded":
            with batch_of(text(10, 200)) as batch:
                assert llama_cpp.llama_decode(cache.ctx, batch) == 0
        else:
            llama_cpp.llama_memory_clear(memory, False)
        released = count_releases(monkeypatch)
        state = seq_state(cache.ctx, 0)
        with caplog.at_level(logging.WARNING, "kvpsi"):
            cache.seq_rm(1, 0, 150)
            cache.evict(100)
            cache.release_slack()
            assert cache.give_now() == 0
        assert released == []
        assert not cache.trusted
        assert [r.getMessage() for r in caplog.records if r.name == "kvpsi"] == [
            f"kvpsi stops giving memory back until the cache is cleared: {cache.distrust_reason}."
        ]
        assert seen.named("distrust") == [cache.distrust_reason]
        assert seq_state(cache.ctx, 0) == state, "nobody touched what lives"
        following = llama_cpp.llama_memory_seq_pos_max(memory, 0) + 1
        assert decode(cache, text(3, following)) == 0, "it goes on as stock llama.cpp does"

        cache.clear()
        assert cache.trusted and released
        assert cache.resident_bytes() <= 2 * 60 * pages.PAGE_BYTES
        assert decode(cache, text(100)) == 0
        assert cache.seq_rm(0, -1, -1)
        assert cache.trusted


def test_a_hole_made_behind_its_back_is_noticed_by_the_next_decode(model: llama_cpp.llama_model_p) -> None:
    with elastic(model) as cache, open_context(model, SMALL) as stock:
        assert decode(cache, text(200)) == 0
        with batch_of(text(200)) as batch:
            assert llama_cpp.llama_decode(stock, batch) == 0
        for ctx in (cache.ctx, stock):
            assert llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(ctx), 0, 50, 60)
        cache.release_slack()  # first and last position are as they were: nothing to see yet
        assert decode(cache, text(5, 200)) == 0
        with batch_of(text(5, 200)) as batch:
            assert llama_cpp.llama_decode(stock, batch) == 0
        assert not cache.trusted
        assert np.array_equal(logits(cache.ctx), logits(stock))


def test_a_kernel_that_refuses_turns_releasing_off_and_nothing_breaks(
    model: llama_cpp.llama_model_p, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with elastic(model) as cache, open_context(model, SMALL) as stock:
        memory = llama_cpp.llama_get_memory(stock)
        assert decode(cache, text(300)) == 0
        with batch_of(text(300)) as batch:
            assert llama_cpp.llama_decode(stock, batch) == 0
        calls = 0

        def refuse(_span: pages.Mapping) -> None:
            nonlocal calls
            calls += 1
            raise OSError(22, "Invalid argument")

        monkeypatch.setattr(pages, "release", refuse)
        with caplog.at_level(logging.WARNING, "kvpsi"):
            assert cache.seq_rm(0, 20, 250)
            assert llama_cpp.llama_memory_seq_rm(memory, 0, 20, 250)
            assert cache.seq_rm(0, 255, 260)
            assert llama_cpp.llama_memory_seq_rm(memory, 0, 255, 260)
            assert cache.evict(50).release.returned_bytes == 0
        assert calls == 1, "asked once, not again and again"
        assert not cache.trusted
        warnings = [r.getMessage() for r in caplog.records if r.name == "kvpsi"]
        assert len(warnings) == 1 and "locked" in warnings[0]
        for tokens in (text(40, 300), text(1, 340)):
            assert decode(cache, tokens) == 0
            with batch_of(tokens) as batch:
                assert llama_cpp.llama_decode(stock, batch) == 0
            assert np.array_equal(logits(cache.ctx), logits(stock))


# -- interrupting ---------------------------------------------------------------------------------------------------


def test_an_interrupted_prefill_stops_at_once_and_ends_as_if_nothing_had_been(model: llama_cpp.llama_model_p) -> None:
    seen = Recorder()
    shape = replace(SMALL, n_ubatch=256)
    asked: list[float] = []
    with elastic(model, shape, instrument=seen) as cache, open_context(model, shape) as stock:

        def disturb() -> None:
            for _ in range(3):
                deadline = time.monotonic() + 20
                while not cache._interruptible and time.monotonic() < deadline:
                    time.sleep(0.002)
                time.sleep(0.1)
                if cache.interrupt():
                    asked.append(time.monotonic())
                time.sleep(0.05)

        thread = threading.Thread(target=disturb)
        thread.start()
        assert decode(cache, text(500), divisible=True) == 0
        thread.join()
        told = [at for name, _, at in seen.events if name == "interrupt"]
        assert cache.interrupts == len(told) >= 1
        for request, answer in zip(asked, told, strict=True):
            assert answer - request < 0.5
        assert cache.trusted and cache.used_cells == 500
        assert held(cache.ctx) == list(range(500))
        with batch_of(text(500)) as batch:
            assert llama_cpp.llama_decode(stock, batch) == 0
        assert np.array_equal(logits(cache.ctx), logits(stock)), "the same micro-batches, so the same bits"
        assert cache.seq_rm(0, 100, 400) and cache.trusted


def stop_at_once(cache: ElasticCache, monkeypatch: pytest.MonkeyPatch, before: Callable[[], None]) -> list[bool]:
    """Have every decode that may be stopped be stopped at its first node; returns for each whether it might be."""
    asked: list[bool] = []
    computing = cache._computing

    @contextlib.contextmanager
    def stopped(ctx: Any, allowed: bool) -> Iterator[None]:
        with computing(ctx, allowed):
            asked.append(allowed)
            if allowed:
                before()
                assert cache.interrupt()
            yield

    monkeypatch.setattr(cache, "_computing", stopped)
    return asked


def test_a_prefill_may_be_stopped_again_as_long_as_that_gives_memory(
    model: llama_cpp.llama_model_p, monkeypatch: pytest.MonkeyPatch
) -> None:
    with elastic(model, SMALL) as cache:
        assert decode(cache, text(300)) == 0

        def lower() -> None:
            cache.set_limit((cache.used_cells - 40) * cache.bytes_per_cell, None)

        asked = stop_at_once(cache, monkeypatch, lower)
        assert decode(cache, text(30, 300), divisible=True) == 0
        assert asked.count(True) > 3 and not asked[-1], "it ends once nothing more can be given"
        assert cache.used_cells <= cache.allowed_cells == cache.floor_cells
        assert cache.trusted and held(cache.ctx)[-30:] == list(range(300, 330))


def test_single_tokens_can_be_stopped_and_come_out_the_same(
    model: llama_cpp.llama_model_p, monkeypatch: pytest.MonkeyPatch
) -> None:
    with elastic(model, SMALL) as cache, open_context(model, SMALL) as stock:
        asked = stop_at_once(cache, monkeypatch, lambda: None)
        for at in range(10):
            assert decode(cache, text(1, at)) == 0
            with batch_of(text(1, at)) as batch:
                assert llama_cpp.llama_decode(stock, batch) == 0
            assert np.array_equal(logits(cache.ctx), logits(stock))
        assert 10 <= cache.interrupts == asked.count(True) <= 20 and cache.trusted, "each twice at most"
        assert held(cache.ctx) == list(range(10))


def test_nothing_to_interrupt_is_told_and_leaves_no_mark(model: llama_cpp.llama_model_p) -> None:
    with elastic(model) as cache:
        assert not cache.interrupt()
        assert decode(cache, text(64), divisible=True) == 0
        assert not cache.interrupt()
        assert decode(cache, text(1, 64), divisible=True) == 0
        assert cache.interrupts == 0


def test_pieces_are_what_stock_computes_from_the_same_pieces(model: llama_cpp.llama_model_p) -> None:
    with elastic(model) as cache, open_context(model, SMALL) as stock:
        cache.max_chunk_tokens = 17
        assert decode(cache, text(100), divisible=True) == 0
        for start in range(0, 100, 17):
            with batch_of(text(min(17, 100 - start), start)) as batch:
                assert llama_cpp.llama_decode(stock, batch) == 0
        assert np.array_equal(logits(cache.ctx), logits(stock))
        assert cache.trusted and held(cache.ctx) == list(range(100))


def test_a_batch_with_several_outputs_is_never_cut(model: llama_cpp.llama_model_p) -> None:
    with elastic(model) as cache, open_context(model, SMALL) as stock:
        cache.max_chunk_tokens = 7
        with batch_of(text(40), range(40)) as batch:
            assert cache.decode(batch, divisible=True) == 0
            assert llama_cpp.llama_decode(stock, batch) == 0
        for i in (0, 13, 39):
            assert np.array_equal(logits(cache.ctx, i), logits(stock, i))


def test_a_governors_thread_may_act_at_any_time(model: llama_cpp.llama_model_p) -> None:
    with elastic(model) as cache:
        stop = threading.Event()
        errors: list[BaseException] = []

        def govern() -> None:
            rng = random.Random(1)
            try:
                while not stop.is_set():
                    cells = rng.randrange(0, cache.n_cells + 1)
                    cache.set_limit(cells * cache.bytes_per_cell, rng.choice([None, 8, 16, 64]))
                    cache.status()
                    if cache.give_now() is None and rng.random() < 0.05:
                        cache.interrupt()
                    time.sleep(0.01)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=govern)
        thread.start()
        pos = 0
        try:
            for count in (60, 1, 60, 1, 60, 1, 30):
                assert decode(cache, text(count, pos), divisible=True) == 0
                pos += count
        finally:
            stop.set()
            thread.join()
        assert errors == []
        assert cache.trusted
        positions = held(cache.ctx)
        assert positions[:4] == [0, 1, 2, 3] and positions[-16:] == list(range(pos - 16, pos))
        assert len(positions) == cache.used_cells


# -- the gate -------------------------------------------------------------------------------------------------------


def test_a_limit_below_need_evicts_but_never_what_is_protected(model: llama_cpp.llama_model_p) -> None:
    forgotten: list[Forgotten] = []
    with elastic(model, on_forgotten=forgotten.append) as cache:
        cache.set_limit(250 * cache.bytes_per_cell, None)
        assert decode(cache, text(200)) == 0
        assert forgotten == []
        assert decode(cache, text(60, 200)) == 0
        positions = held(cache.ctx)
        assert len(positions) == cache.used_cells <= 250
        assert positions[:4] == [0, 1, 2, 3]
        assert positions[-76:] == list(range(184, 260)), "the last 16 before the batch, and the batch"
        gone = {p for f in forgotten for p in range(f.first_pos, f.end_pos)}
        assert gone == set(range(260)) - set(positions)
        assert cache.trims == 1 and cache.trusted
        for pos in range(260, 420):
            assert decode(cache, text(1, pos)) == 0
            assert cache.used_cells <= 250
        positions = held(cache.ctx)
        assert positions[:4] == [0, 1, 2, 3] and positions[-16:] == list(range(404, 420))
        assert cache.first_gap(0) == 4


def test_nobody_sees_an_eviction_halfway(model: llama_cpp.llama_model_p) -> None:
    """What is in use falls before it is counted as forgotten: whoever looks meanwhile sees what was before."""
    seen: list[tuple[int, int]] = []

    def look(_: Forgotten) -> None:
        status = cache.status()
        seen.append((status.used_bytes, status.forgotten_bytes))

    with elastic(model, on_forgotten=look) as cache:
        assert decode(cache, text(200)) == 0
        before = cache.status()
        cache.evict(60)
        after = cache.status()
        assert seen == [(before.used_bytes, 0)]
        assert after.forgotten_bytes == before.used_bytes - after.used_bytes > 0


def test_a_limit_under_the_floor_stops_at_the_floor(model: llama_cpp.llama_model_p) -> None:
    with elastic(model) as cache:
        assert decode(cache, text(300)) == 0
        cache.set_limit(0, 16)
        assert cache.allowed_cells == cache.floor_cells
        assert cache.give_now() is not None
        assert 20 <= cache.used_cells <= cache.floor_cells
        assert cache.status().used_bytes <= cache.status().floor_bytes
        assert decode(cache, text(100, 300), divisible=True) == 0
        assert cache.used_cells <= cache.floor_cells


def test_refused_when_nothing_may_go_and_then_nothing_has_changed(model: llama_cpp.llama_model_p) -> None:
    seen, forgotten = Recorder(), []
    settings = CacheSettings(keep=0, tail=100, min_prune=16)
    shape = replace(SMALL, n_seq=3)
    with elastic(model, shape, settings=settings, instrument=seen, on_forgotten=forgotten.append) as cache:
        for seq_id, count in enumerate((150, 100, 100)):
            assert decode(cache, text(count, seq_id=seq_id)) == 0
        before = [seq_state(cache.ctx, s) for s in range(3)]
        cache.set_limit(420 * cache.bytes_per_cell, None)
        assert cache.floor_cells < cache.allowed_cells == 420
        with pytest.raises(CacheRefusedError) as caught:
            decode(cache, text(121, 150))
        assert "121 more tokens" in str(caught.value) and "need 1 cells more" in str(caught.value)
        assert "limit that memory sets of 420 cells" in str(caught.value) and "\n" not in str(caught.value)
        assert [seq_state(cache.ctx, s) for s in range(3)] == before, "50 tokens could go, but they would not suffice"
        assert forgotten == [] and cache.trims == 0 and cache.used_cells == 350
        assert seen.named("refusal") == [{"wanted_cells": 121, "limit_cells": 420}]
        assert decode(cache, text(120, 150)) == 0, "what fits after evicting is taken"
        assert cache.used_cells <= 420 and cache.trusted


@pytest.mark.parametrize(
    ("limit", "cap", "names"),
    [(200, 512, "limit that memory sets of 200"), (512, 200, "cache limit of 200"), (200, 1, "floor of")],
)
def test_a_refusal_names_the_limit_that_held(model: llama_cpp.llama_model_p, limit: int, cap: int, names: str) -> None:
    with elastic(model) as cache:
        cache.set_limit(limit * cache.bytes_per_cell, None)
        cache.cap_cells = cap
        with pytest.raises(CacheRefusedError) as caught:
            decode(cache, text(201))
        assert f"{names} " in str(caught.value) and f"of {cache.allowed_cells} cells" in str(caught.value)
        assert cache.used_cells == 0


@pytest.mark.parametrize("name", ["unified", "streams"])
def test_several_sequences_go_on_at_the_floor(model: llama_cpp.llama_model_p, name: str) -> None:
    settings = CacheSettings(keep=4, tail=56, min_prune=4)
    with elastic(model, replace(SHAPES[name], n_ctx=1024), settings=settings) as cache:
        alone = cache.floor_cells
        for seq_id in range(4):
            assert decode(cache, text(100, seq_id=seq_id)) == 0
        assert cache.floor_cells == alone + 3 * 60
        cache.set_limit(0, None)
        cache.give_now()
        for step in range(100, 160):
            assert decode(cache, [t for s in range(4) for t in text(1, step, s)]) == 0
            assert cache.used_cells <= cache.floor_cells == cache.allowed_cells
        assert cache.trims and cache.trusted
        assert cache.seq_rm(1, -1, -1) and cache.floor_cells == alone + 2 * 60
        cache.clear()
        assert cache.floor_cells == alone
        for seq_id in range(3):
            assert decode(cache, text(1 if seq_id else 100, seq_id=seq_id)) == 0
        assert cache.floor_cells <= alone + 2, "of short sequences only what is there"


def test_the_floor_is_never_above_the_cache(model: llama_cpp.llama_model_p) -> None:
    settings = CacheSettings(keep=4, tail=120, min_prune=16)
    with elastic(model, replace(SMALL, n_seq=4), settings=settings) as cache:
        for seq_id in range(4):
            assert decode(cache, text(126, seq_id=seq_id)) == 0
        assert cache.floor_cells == cache.n_cells


def test_the_fullest_stream_gives_first(model: llama_cpp.llama_model_p) -> None:
    with elastic(model, SHAPES["streams"]) as cache:
        for seq_id, count in enumerate((60, 250, 180)):
            assert decode(cache, text(count, seq_id=seq_id)) == 0
        trim = cache.evict(cache.block_cells)
        assert trim.freed_cells >= cache.block_cells
        lost = {s: count - len(held(cache.ctx, s)) for s, count in enumerate((60, 250, 180))}
        assert lost[0] == lost[2] == 0 and lost[1] == trim.freed_cells
        assert cache.trusted


@pytest.mark.parametrize(
    ("may_go", "n_cells", "shares"),
    [
        ([10], 4, {0: 4}),
        ([10, 10], 4, {0: 2, 1: 2}),
        ([5, 100, 40], 30, {1: 30, 2: 0, 0: 0}),
        ([5, 100, 40], 80, {1: 70, 2: 10, 0: 0}),
        ([5, 100, 40], 1000, {1: 100, 2: 40, 0: 5}),
        ([0, 0], 3, {0: 0, 1: 0}),
    ],
)
def test_shares_level_what_is_left(may_go: list[int], n_cells: int, shares: dict[int, int]) -> None:
    assert dict(_shares(may_go, n_cells)) == shares


def test_whoever_watches_and_fails_does_not_stop_an_eviction(
    model: llama_cpp.llama_model_p, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Instrument):
        def event(self, name: str, value: Any) -> None:
            raise ValueError(name, value)

    def forget(_: Forgotten) -> None:
        raise KeyError("no such thing")

    with elastic(model, instrument=Broken(), on_forgotten=forget) as cache:
        assert decode(cache, text(200)) == 0
        assert cache.seq_rm(0, 60, 62)  # two ranges to forget
        with caplog.at_level(logging.WARNING):
            trim = cache.evict(150)
        assert trim.freed_cells >= 150 and cache.trims == 1 and cache.trusted
        assert len([r for r in caplog.records if "what was forgotten failed" in r.getMessage()]) == 1
        assert cache.used_cells == len(held(cache.ctx))


@pytest.mark.parametrize("name", ["f16", "streams"])
def test_a_full_cache_without_a_limit_is_refused_as_stock_does(model: llama_cpp.llama_model_p, name: str) -> None:
    shape = replace(SHAPES[name], n_ctx=256 * (1 if name == "f16" else 4))
    with elastic(model, shape) as cache, open_context(model, shape) as stock:
        for tokens, code in ((text(250), 0), (text(7, 250), 1), (text(6, 250), 0), (text(1, 256), 1)):
            with batch_of(tokens) as batch:
                assert llama_cpp.llama_decode(stock, batch) == code
                assert cache.decode(batch) == code
        assert cache.trusted and held(cache.ctx) == list(range(256))
        assert cache.trims == 0


def test_an_eviction_with_a_sliding_window_is_asked_for_what_can_be_given(gemma: llama_cpp.llama_model_p) -> None:
    with elastic(gemma, Shape(n_ctx=1280, n_seq=1, n_batch=512, n_ubatch=256)) as cache:
        for start in range(0, 1000, 250):
            assert decode(cache, text(250, start)) == 0
        status = cache.status()
        assert status.floor_bytes < status.used_bytes <= status.capacity_bytes
        cache.set_limit(int(status.used_bytes * 0.8), None)
        assert cache.give_now()
        assert cache.used_cells <= 800
        assert cache.status().used_bytes <= 0.8 * status.used_bytes
        assert cache.trusted


# -- saving and restoring -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["default", "gemma"])
def test_a_restored_sequence_goes_on_with_the_same_logits(request: pytest.FixtureRequest, which: str) -> None:
    model = request.getfixturevalue("gemma" if which == "gemma" else "model")
    shape, count = (
        (Shape(n_ctx=1280, n_seq=1, n_batch=256, n_ubatch=128), 900)
        if which == "gemma"
        else (replace(SMALL, n_seq=2), 150)
    )
    with elastic(model, shape) as cache, open_context(model, shape) as stock:
        for start in range(0, count, 150):
            assert decode(cache, text(150, start)) == 0
            with batch_of(text(150, start)) as batch:
                assert llama_cpp.llama_decode(stock, batch) == 0
        state = seq_state(cache.ctx, 0)
        assert state == seq_state(stock, 0)
        cache.clear()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(stock), True)
        assert cache.used_cells == 0 and cache.resident_bytes() < 0.1 * cache.capacity_bytes
        assert cache.load_sequence(state, 0)
        source = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        assert llama_cpp.llama_state_seq_set_data(stock, source, len(state), 0)
        assert cache.trusted
        assert seq_state(cache.ctx, 0) == state
        for tokens in (text(1, count), text(130, count + 1), text(1, count + 131)):
            assert decode(cache, tokens) == 0
            with batch_of(tokens) as batch:
                assert llama_cpp.llama_decode(stock, batch) == 0
            assert np.array_equal(logits(cache.ctx), logits(stock))
        assert cache.trusted
        assert cache.seq_rm(0, 100, 200) and cache.trusted
        assert cache.release_slack() is not None and cache.trusted


def test_a_state_in_a_mapped_file_is_loaded_without_a_copy(model: llama_cpp.llama_model_p, tmp_path: Path) -> None:
    file = tmp_path / "state.bin"
    with elastic(model, SMALL) as cache:
        assert decode(cache, text(300)) == 0
        state = seq_state(cache.ctx, 0)
        file.write_bytes(state)
        cache.clear()
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            tracemalloc.start()
            try:
                assert cache.load_sequence(mapped, 0)
                peak_bytes = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert peak_bytes < len(state) / 8
        assert cache.trusted and seq_state(cache.ctx, 0) == state


def test_a_state_goes_through_the_gate(model: llama_cpp.llama_model_p) -> None:
    settings = CacheSettings(keep=0, tail=100, min_prune=16)
    with elastic(model, replace(SMALL, n_seq=3), settings=settings) as cache:
        for seq_id, count in enumerate((200, 100, 100)):
            assert decode(cache, text(count, seq_id=seq_id)) == 0
        state = seq_state(cache.ctx, 0)
        assert cache.seq_rm(0, -1, -1)
        cache.set_limit(380 * cache.bytes_per_cell, None)
        with pytest.raises(CacheRefusedError):
            cache.load_sequence(state, 0)
        assert cache.used_cells == 200 and cache.trusted
        cache.set_limit(400 * cache.bytes_per_cell, None)
        assert cache.load_sequence(state, 0)
        assert held(cache.ctx) == list(range(200)) and cache.trusted


@pytest.mark.parametrize("name", ["unified", "streams"])
def test_a_state_that_does_not_fit_leaves_the_old_one(model: llama_cpp.llama_model_p, name: str) -> None:
    settings = CacheSettings(keep=0, tail=100, min_prune=16)
    with elastic(model, SHAPES[name], settings=settings) as cache:
        assert decode(cache, text(200)) == 0
        long = seq_state(cache.ctx, 0)
        assert cache.seq_rm(0, -1, -1)
        for seq_id in range(2):
            assert decode(cache, text(100, seq_id=seq_id)) == 0
        before = [seq_state(cache.ctx, s) for s in range(2)]
        cache.set_limit(280 * cache.bytes_per_cell, None)
        with pytest.raises(CacheRefusedError):
            cache.load_sequence(long, 0)
        assert [seq_state(cache.ctx, s) for s in range(2)] == before and cache.trusted
        cache.set_limit(300 * cache.bytes_per_cell, None)
        assert cache.load_sequence(long, 0), "what the old one frees counts"
        assert seq_state(cache.ctx, 0) == long and cache.used_cells == 300 and cache.trusted


def test_a_state_in_other_cells_than_predicted_is_noticed(model: llama_cpp.llama_model_p) -> None:
    with elastic(model, replace(SMALL, n_seq=2)) as cache:
        assert decode(cache, text(50)) == 0
        state = seq_state(cache.ctx, 0)
        cache.trackers[0].mirror.streams[0].head = 60
        assert cache.load_sequence(state, 1)
        assert not cache.trusted and cache.evict(30).freed_cells == 0


def test_a_limit_that_falls_after_a_state_was_granted_loses_nothing(
    model: llama_cpp.llama_model_p, monkeypatch: pytest.MonkeyPatch
) -> None:
    with elastic(model, SMALL, settings=CacheSettings(keep=0, tail=20, min_prune=16)) as cache:
        assert decode(cache, text(200)) == 0
        state = seq_state(cache.ctx, 0)
        assert cache.seq_rm(0, 100, -1)
        drop = cache._drop

        def drop_and_lower(seq_id: int) -> None:
            drop(seq_id)
            cache.set_limit(150 * cache.bytes_per_cell, None)

        monkeypatch.setattr(cache, "_drop", drop_and_lower)
        assert cache.load_sequence(state, 0)
        assert held(cache.ctx) == list(range(200)) and cache.trusted


def test_a_stream_copy_that_was_cleared_before_it_was_made_takes_no_memory(model: llama_cpp.llama_model_p) -> None:
    with elastic(model, SHAPES["streams"]) as cache:
        assert decode(cache, text(200)) == 0
        cache.seq_cp(0, 1, -1, -1)
        cache.clear()
        assert decode(cache, text(3)) == 0
        assert cache.trusted and cache.used_cells == 3
        assert cache.resident_bytes() < 0.15 * cache.capacity_bytes


def test_part_of_a_sequence_is_not_copied_between_streams(model: llama_cpp.llama_model_p) -> None:
    with elastic(model, SHAPES["streams"]) as cache:
        assert decode(cache, text(50)) == 0
        with pytest.raises(UsageError, match="whole sequences"):
            cache.seq_cp(0, 1, 0, 20)
        cache.seq_cp(0, 1, 0, -1)
        assert decode(cache, text(5, seq_id=2)) == 0 and cache.trusted


@pytest.mark.parametrize("name", ["unified", "streams"])
def test_an_empty_sequence_is_restored_as_empty(model: llama_cpp.llama_model_p, name: str) -> None:
    with elastic(model, SHAPES[name]) as cache:
        assert decode(cache, text(20)) == 0
        assert decode(cache, text(30, seq_id=1)) == 0
        assert cache.load_sequence(seq_state(cache.ctx, 2), 1)
        assert cache.used_cells == 20 and cache.trusted
        assert decode(cache, text(5, seq_id=1)) == 0 and cache.trusted


def test_what_is_no_state_of_this_model_is_refused_before_anything_is_lost(
    model: llama_cpp.llama_model_p, gemma: llama_cpp.llama_model_p
) -> None:
    with elastic(gemma, Shape(n_ctx=512, n_seq=1)) as other:
        assert decode(other, text(10)) == 0
        foreign = seq_state(other.ctx, 0)
    with elastic(model) as cache:
        assert decode(cache, text(50)) == 0
        state = seq_state(cache.ctx, 0)
        negative = state[:16] + b"\xff\xff\xff\xff" + state[20:]
        for wrong in (b"", b"GGUF", state[:-1], state[: len(state) // 2], state + b"\0", foreign, negative):
            with pytest.raises(LayoutError):
                cache.load_sequence(wrong, 0)
            assert seq_state(cache.ctx, 0) == state and cache.trusted
        assert decode(cache, text(1, 50)) == 0


# -- Ctrl-C, and being trusted again -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unified", "streams", "gemma"])
@pytest.mark.parametrize("n_tokens", [1, 40])
def test_ctrl_c_right_after_a_decode_loses_nothing(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str, n_tokens: int
) -> None:
    """That is where Python raises it, as llama.cpp itself is not interrupted."""
    model = request.getfixturevalue("gemma" if name == "gemma" else "model")
    shape = Shape(n_ctx=1280, n_seq=1, n_batch=256, n_ubatch=128) if name == "gemma" else SHAPES[name]
    with elastic(model, shape) as cache:
        assert decode(cache, text(100)) == decode(cache, text(1, 100)) == 0
        decode_really = llama_cpp.llama_decode

        def interrupted(ctx: Any, batch: Any) -> int:
            decode_really(ctx, batch)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(llama_cpp, "llama_decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                decode(cache, text(n_tokens, 101))
        assert cache.trusted and cache.used_cells == 101 + n_tokens
        assert cache.seq_rm(0, 101, -1)
        assert decode(cache, text(3, 101)) == 0
        assert cache.release_slack() is not None and cache.trusted
        assert held(cache.ctx) == list(range(104))


def test_taking_out_everything_is_a_new_beginning(model: llama_cpp.llama_model_p) -> None:
    with elastic(model, replace(SMALL, n_seq=2)) as cache:
        assert decode(cache, text(50)) == 0
        assert decode(cache, text(20, seq_id=1)) == 0
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(cache.ctx), 0, 40, -1)
        assert cache.release_slack().requested_bytes == 0 and not cache.trusted
        assert cache.seq_rm(0, 0, -1) and not cache.trusted, "the other one may be anywhere"
        assert cache.seq_rm(1, -1, -1) and cache.trusted
        assert decode(cache, text(30)) == 0 and cache.trusted and cache.used_cells == 30


def test_what_was_written_while_distrusted_is_no_surprise_afterwards(model: llama_cpp.llama_model_p) -> None:
    """The first and last page of the cache are never given back: what is in them stays."""
    with elastic(model, SMALL) as cache:
        assert decode(cache, text(8)) == 0
        cache._distrust("for this test")
        other = [(token + 17, pos, seqs) for token, pos, seqs in text(8)]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(cache.ctx), False)
        assert decode(cache, other) == 0
        cache.clear()
        assert cache.trusted
        assert decode(cache, other) == 0
        assert cache.release_slack() is not None and cache.trusted


# -- leaving --------------------------------------------------------------------------------------------------------


def test_after_closing_the_context_is_an_ordinary_one(model: llama_cpp.llama_model_p) -> None:
    with open_context(model, SMALL) as ctx, open_context(model, SMALL) as stock:
        cache = ElasticCache(ctx, settings=SETTINGS)
        assert decode(cache, text(100)) == 0
        cache.close()
        cache._abort[0] = b"\1"
        assert not cache.interrupt()
        with batch_of(text(100)) as batch:
            assert llama_cpp.llama_decode(stock, batch) == 0
        with batch_of(text(30, 100)) as batch:
            assert llama_cpp.llama_decode(ctx, batch) == llama_cpp.llama_decode(stock, batch) == 0
        assert np.array_equal(logits(ctx), logits(stock))


@pytest.mark.parametrize("left", [1, 5, 15, 40])
def test_a_few_live_cells_without_flash_attention_keep_their_values(model: llama_cpp.llama_model_p, left: int) -> None:
    """There a live cell is two bytes between free ones, which are given back around it."""
    shape = Shape(n_ctx=4096, n_seq=1, flash=False)
    with open_context(model, shape) as ctx, open_context(model, shape) as stock:
        cache = ElasticCache(ctx, settings=SETTINGS)
        memory = llama_cpp.llama_get_memory(stock)
        for start in range(0, 300, 60):
            with batch_of(text(60, start)) as batch:
                assert cache.decode(batch) == llama_cpp.llama_decode(stock, batch) == 0
        assert cache.seq_rm(0, left, -1)
        assert llama_cpp.llama_memory_seq_rm(memory, 0, left, -1)
        cache.release_slack()
        with batch_of(text(3, left)) as batch:
            assert cache.decode(batch) == llama_cpp.llama_decode(stock, batch) == 0
        assert np.array_equal(logits(ctx), logits(stock))
        cache.close()
