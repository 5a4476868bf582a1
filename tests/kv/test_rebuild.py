"""Resizing by rebuilding the context, on a real model: nothing is lost, and what goes wrong is survived."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from contexts import batch_of

from kvpsi.engines.caches import make_rebuilt
from kvpsi.engines.llama import GovernedLlama, govern, govern_with
from kvpsi.engines.loading import LoadSettings, open_llama
from kvpsi.errors import CacheRefusedError, LayoutError, RebuildError, UsageError
from kvpsi.instrument import Instrument
from kvpsi.kv import CacheSettings, Forgotten, Rebuild, RebuildSettings, RebuiltCache
from kvpsi.kv.pages import process_rss_bytes, trim_heap
from kvpsi.pressure import ManualClock, ScriptedSource, make_reading

pytestmark = pytest.mark.engine

N_CTX = 2048
SMALL = CacheSettings(keep=4, tail=64, min_prune=16)
TEXT = "The keeper of the lighthouse wrote down the wind, the height of the waves and the ships that passed. "


class Events(Instrument):
    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def event(self, name: str, value: Any) -> None:
        self.seen.append((name, value))

    def rebuilds(self) -> list[Rebuild]:
        return [value for name, value in self.seen if name == "rebuild"]


@contextlib.contextmanager
def opened(path: Path, n_ctx: int = N_CTX) -> Iterator[llama_cpp.Llama]:
    with contextlib.closing(open_llama(path, n_ctx, LoadSettings(n_threads=1))) as llm:
        yield llm


@contextlib.contextmanager
def rebuilt(path: Path, n_ctx: int = N_CTX) -> Iterator[tuple[GovernedLlama, Events]]:
    """A governed model whose context is rebuilt, on a machine that has memory to spare."""
    events = Events()
    with (
        opened(path, n_ctx) as llm,
        govern_with(
            make_rebuilt, llm, cache_settings=SMALL, source=ScriptedSource([make_reading()]), instrument=events
        ) as governed,
    ):
        yield governed, events


@pytest.fixture(scope="module")
def prompt(default_model: Path) -> list[int]:
    with opened(default_model, 256) as llm:
        return list(llm.tokenize((TEXT * 20).encode()))[:400]


@pytest.fixture(scope="module")
def expected(default_model: Path, prompt: list[int]) -> list[int]:
    """What stock llama.cpp answers."""
    with opened(default_model) as llm:
        return answer(llm, prompt, 140)


def answer(llm: llama_cpp.Llama, prompt: list[int], count: int) -> list[int]:
    return list(islice(llm.generate(prompt, temp=0.0), count))


def test_shrinking_and_growing_in_mid_answer_changes_no_word(
    default_model: Path, prompt: list[int], expected: list[int]
) -> None:
    with rebuilt(default_model) as (governed, events):
        tokens = governed.llm.generate(prompt, temp=0.0)
        written = list(islice(tokens, 5))
        governed.set_cache_limit(0.25)
        written += islice(tokens, 5)
        assert governed.cache.committed_cells == 512
        governed.set_cache_limit(1.0)
        written += islice(tokens, len(expected) - 10)
        tokens.close()
        assert written == expected
        assert [(r.from_cells, r.to_cells) for r in events.rebuilds()] == [(2048, 512), (512, 1024)]
        assert governed.summary().mode == "rebuild"
        assert governed.summary().trims == 0


def test_memory_goes_back_as_the_kernel_counts_it(default_model: Path, prompt: list[int]) -> None:
    with rebuilt(default_model) as (governed, events):
        answer(governed.llm, prompt, 3)
        trim_heap()
        before = process_rss_bytes()
        governed.set_cache_limit(0.25)
        fell = before - process_rss_bytes()
        cells = 1536 * governed.cache.bytes_per_cell
        assert governed.cache.committed_cells == 512
        assert 0.9 * cells < fell < 1.5 * cells  # the buffers for computing shrink a little, too
        assert events.rebuilds()[0].returned_bytes == pytest.approx(fell, rel=0.05)
        assert governed.cache.resident_bytes() == 512 * governed.cache.bytes_per_cell


def test_nothing_is_rebuilt_while_somebody_may_sample(default_model: Path, prompt: list[int]) -> None:
    with rebuilt(default_model) as (governed, events):
        tokens = governed.llm.generate(prompt, temp=0.0)
        next(tokens)
        governed.cache.cap_cells = 512
        assert governed.cache.give_now() is None
        tokens.close()
        assert not events.rebuilds()
        given = governed.cache.give_now()
        assert given is not None and given > 0
        governed.llm.eval([1])
        governed.cache.cap_cells = 256
        assert governed.cache.give_now() is None


def test_the_same_prompt_again_is_not_answered_from_lost_logits(
    default_model: Path, prompt: list[int], expected: list[int]
) -> None:
    with rebuilt(default_model) as (governed, _):
        governed.llm.eval(prompt)
        with governed.cache.request():
            pass
        governed.set_cache_limit(0.5)
        assert answer(governed.llm, prompt, 5) == expected[:5]


def test_a_lower_limit_than_the_tokens_need_forgets_the_oldest(default_model: Path, prompt: list[int]) -> None:
    forgotten: list[Forgotten] = []
    with rebuilt(default_model) as (governed, _):
        governed.cache.on_forgotten = forgotten.append
        answer(governed.llm, prompt, 3)
        used = governed.cache.used_cells
        governed.set_cache_limit(0.125)
        assert forgotten == [Forgotten(0, SMALL.keep, SMALL.keep + used - 256, used - 256)]
        assert governed.cache.used_cells == governed.cache.committed_cells == 256
        assert governed.cache.first_gap(0) == SMALL.keep
        assert len(answer(governed.llm, [*prompt, 5], 40)) == 40
        assert governed.cache.committed_cells == 256


def test_a_prompt_as_long_as_the_first_context_is_still_read(default_model: Path) -> None:
    with rebuilt(default_model, 1024) as (governed, _):
        governed.set_cache_limit(0.25)
        assert governed.cache.committed_cells == 256
        assert governed.llm.n_ctx() == 1024
        assert len(answer(governed.llm, [100 + i for i in range(600)], 2)) == 2
        governed.set_cache_limit(1.0)
        assert len(answer(governed.llm, [200 + i for i in range(800)], 2)) == 2
        assert governed.cache.first_gap(0) == 801
        assert governed.cache.committed_cells == 1024


def test_without_memory_for_the_new_context_the_old_size_comes_back(
    default_model: Path, prompt: list[int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = llama_cpp.llama_init_from_model
    refusals = [None]
    with rebuilt(default_model) as (governed, events):
        written = answer(governed.llm, prompt, 5)
        monkeypatch.setattr(llama_cpp, "llama_init_from_model", lambda *a: refusals.pop() if refusals else make(*a))
        governed.set_cache_limit(0.5)
        assert not refusals
        assert [(r.wanted_cells, r.to_cells) for r in events.rebuilds()] == [(1024, 2048)]
        assert answer(governed.llm, prompt + written, 20) == expected[5:25]


def test_without_memory_for_any_context_the_conversation_is_kept(
    default_model: Path, prompt: list[int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with rebuilt(default_model) as (governed, _):
        tokens = governed.llm.generate(prompt, temp=0.0)
        written = list(islice(tokens, 5))
        with monkeypatch.context() as patch:
            patch.setattr(llama_cpp, "llama_init_from_model", lambda *_: None)
            governed.set_cache_limit(0.5)
            for _ in range(2):
                with pytest.raises(RebuildError, match="conversation is kept"):
                    governed.llm.eval([written[-1]])
            with pytest.raises(RebuildError, match="conversation is kept"):
                governed.close()
            tokens.close()
        assert answer(governed.llm, prompt + written, 20) == expected[5:25]
        assert governed.cache.first_gap(0) == governed.llm.n_tokens


def test_a_context_that_refuses_its_own_state_is_left_empty_and_usable(
    default_model: Path, prompt: list[int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with rebuilt(default_model) as (governed, _):
        tokens = governed.llm.generate(prompt, temp=0.0)
        next(tokens)
        with monkeypatch.context() as patch:
            patch.setattr(llama_cpp, "llama_state_seq_set_data", lambda *_: 0)
            governed.set_cache_limit(0.5)
            with pytest.raises(RebuildError, match="send the request again"):
                next(tokens)
        assert governed.cache.used_cells == governed.llm.n_tokens == 0
        assert answer(governed.llm, prompt, 20) == expected[:20]


def test_state_saved_before_a_rebuild_is_loaded_after_it(
    default_model: Path, prompt: list[int], expected: list[int]
) -> None:
    with rebuilt(default_model) as (governed, _):
        written = answer(governed.llm, prompt, 5)
        state = governed.llm.save_state()
        answer(governed.llm, [7, 8, 9], 2)
        governed.set_cache_limit(0.25)
        governed.llm.load_state(state)
        assert answer(governed.llm, prompt + written, 10) == expected[5:15]


def test_a_state_that_does_not_fit_leaves_the_conversation(
    default_model: Path, prompt: list[int], expected: list[int]
) -> None:
    with rebuilt(default_model, 1024) as (governed, _):
        long = governed.llm.save_state() if answer(governed.llm, prompt * 2, 1) else None
        governed.llm.reset()
        written = answer(governed.llm, prompt, 5)
        governed.set_cache_limit(0.5)
        with pytest.raises(CacheRefusedError):
            governed.llm.load_state(long)
        assert governed.cache.used_cells == governed.llm.n_tokens > 400
        assert answer(governed.llm, prompt + written, 10) == expected[5:15]


def test_close_gives_the_model_back_as_it_was(default_model: Path, prompt: list[int], expected: list[int]) -> None:
    with opened(default_model) as llm:
        before = set(vars(llm)), set(vars(llm._ctx))
        governed = govern_with(make_rebuilt, llm, source=ScriptedSource([make_reading()]))
        written = answer(llm, prompt, 5)
        governed.set_cache_limit(0.25)
        governed.close()
        governed.close()
        assert (set(vars(llm)), set(vars(llm._ctx))) == before
        assert llama_cpp.llama_n_ctx(llm.ctx) == N_CTX
        assert answer(llm, prompt + written, 20) == expected[5:25]


def test_a_model_that_cannot_have_its_size_back_knows_its_new_one(
    default_model: Path, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = llama_cpp.llama_init_from_model
    with opened(default_model) as llm:
        governed = govern_with(make_rebuilt, llm, source=ScriptedSource([make_reading()]))
        answer(llm, prompt[:50], 3)
        governed.set_cache_limit(0.25)
        monkeypatch.setattr(
            llama_cpp, "llama_init_from_model", lambda model, p: None if p.n_ctx > 512 else make(model, p)
        )
        governed.close()
        assert llm.n_ctx() == llm._n_ctx == llm.n_batch == 512
        with pytest.raises(ValueError, match="exceed context window"):
            llm.create_completion(TEXT * 40)
        assert len(answer(llm, prompt, 5)) == 5


def test_pages_that_are_not_found_lead_to_rebuilding(
    default_model: Path, prompt: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def not_found(_: object) -> None:
        raise LayoutError("The KV tensors were not found.")

    monkeypatch.setattr("kvpsi.kv.elastic.discover", not_found)
    with opened(default_model, 512) as llm:
        llm.eval(prompt[:100])
        with pytest.raises(LayoutError, match="not found"):
            govern(llm, rebuild=False)
        with (
            caplog.at_level(logging.WARNING, "kvpsi"),
            govern(llm, cache_limit=0.5, cache_settings=SMALL, source=ScriptedSource([make_reading()])) as governed,
        ):
            summary = governed.summary()
            assert summary.mode == "rebuild"
            assert summary.resident_bytes == summary.capacity_bytes // 2
            assert governed.cache.used_cells == 100
        assert ["rebuilding the context" in r.message for r in caplog.records] == [True]


def test_a_cache_whose_pages_can_be_given_back_is_not_rebuilt(default_model: Path) -> None:
    llm = llama_cpp.Llama(str(default_model), n_ctx=512, n_threads=1, flash_attn=False, verbose=False)
    with contextlib.closing(llm), govern(llm, source=ScriptedSource([make_reading()])) as governed:
        assert governed.summary().mode == "pages"


def test_the_governor_makes_an_idle_context_smaller_and_knows_what_it_gave(default_model: Path) -> None:
    with rebuilt(default_model) as (governed, events):
        governed.governor.on_reading(make_reading(available_bytes=64 << 20))
        assert governed.cache.committed_cells == 1536
        (done,) = events.rebuilds()
        governed.governor.on_reading(make_reading(available_bytes=4 << 30))  # the next tick takes note
        assert [given for _, given, _ in governed.governor.state.given] == [done.returned_bytes]
        assert done.returned_bytes > 0.9 * 512 * governed.cache.bytes_per_cell


def test_a_sliding_window_comes_along(gemma_model: Path, prompt: list[int]) -> None:
    with opened(gemma_model, 1024) as stock:
        wanted = answer(stock, prompt, 12)
    with rebuilt(gemma_model, 1024) as (governed, _):
        tokens = governed.llm.generate(prompt, temp=0.0)
        written = list(islice(tokens, 4))
        governed.cache.cap_cells = 768
        written += islice(tokens, 8)
        tokens.close()
        assert governed.cache.committed_cells == 768
        assert written == wanted


@contextlib.contextmanager
def bare(llm: llama_cpp.Llama, clock: ManualClock, **more: Any) -> Iterator[RebuiltCache]:
    cache = RebuiltCache(llm._ctx, settings=SMALL, clock=clock, **more)
    yield cache
    cache.close()


def read(cache: RebuiltCache, count: int) -> None:
    start = int(llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(cache.ctx), 0)) + 1
    with batch_of([(100 + start + i, start + i, 0) for i in range(count)]) as batch:
        assert cache.decode(batch, divisible=True) == 0


def limit(cache: RebuiltCache, cells: int) -> None:
    cache.set_limit(cells * cache.bytes_per_cell, None)


def test_rebuilds_are_rare_and_large(default_model: Path) -> None:
    clock, events = ManualClock(), Events()
    with (
        opened(default_model) as llm,
        bare(llm, clock, pace=RebuildSettings(min_interval_s=2.0), instrument=events) as cache,
    ):
        read(cache, 100)
        limit(cache, 2000)  # a little is asked for, a step is given
        read(cache, 1)
        assert cache.committed_cells == 1536
        limit(cache, 1200)
        clock.advance(1.9)
        read(cache, 1)
        assert cache.committed_cells == 1536
        clock.advance(0.1)
        read(cache, 1)
        assert cache.committed_cells == 1024
        limit(cache, 0)
        clock.advance(2.0)
        read(cache, 1)
        assert cache.committed_cells == cache.floor_cells == 256
        assert cache.status().used_bytes == cache.status().floor_bytes
        read(cache, 200)
        assert cache.used_cells <= 256
        assert [r.to_cells for r in events.rebuilds()] == [1536, 1024, 256]
        assert cache.trims > 0


def test_a_step_does_not_forget_what_the_limit_has_room_for(default_model: Path) -> None:
    pace = RebuildSettings(min_step_share=0.5)
    with opened(default_model, 1024) as llm, bare(llm, ManualClock(), pace=pace) as cache:
        read(cache, 512)
        limit(cache, 900)
        read(cache, 1)
        assert cache.committed_cells == 768
        assert cache.trims == 0


def test_growing_leaves_room_for_the_saved_copy(default_model: Path) -> None:
    clock = ManualClock()
    with opened(default_model) as llm, bare(llm, clock) as cache:
        read(cache, 200)
        limit(cache, 256)
        for _ in range(4):
            clock.advance(2.0)
            read(cache, 1)
        assert cache.committed_cells == 256
        limit(cache, 900)  # beside the 204 tokens that is 512, less than a step more
        read(cache, 60)
        assert cache.committed_cells == 256
        assert cache.trims == 1
        limit(cache, 1100)
        read(cache, 60)
        assert cache.committed_cells == 768
        limit(cache, 2048)
        read(cache, 512)
        assert cache.committed_cells == 1280


def test_what_else_the_context_had_comes_along(default_model: Path) -> None:
    equipped = []
    with opened(default_model, 512) as llm:
        llm._ctx.set_n_threads(1, 2)
        with bare(llm, ManualClock(), equip=lambda ctx: not equipped.append(ctx)) as cache:
            read(cache, 20)
            cache.cap_cells = 256
            read(cache, 1)
            assert equipped == [llm.ctx] == [cache.ctx]
            assert (llama_cpp.llama_n_threads(llm.ctx), llama_cpp.llama_n_threads_batch(llm.ctx)) == (1, 2)
            assert llm._ctx.memory == llama_cpp.llama_get_memory(llm.ctx)


def test_a_shift_that_waits_for_the_next_decode_is_not_saved(default_model: Path) -> None:
    with opened(default_model, 1024) as llm, bare(llm, ManualClock()) as cache:
        read(cache, 300)
        assert cache.seq_rm(0, 10, 60)
        cache.seq_add(0, 60, -1, -50)
        assert cache.first_gap(0) == cache.used_cells == 250
        cache.cap_cells = 512
        read(cache, 1)
        assert cache.committed_cells == 1024
        read(cache, 1)
        assert cache.committed_cells == 512
        assert cache.first_gap(0) == 252
        assert cache.trusted


def test_a_sequence_changed_elsewhere_is_not_carried_over(default_model: Path) -> None:
    with opened(default_model, 1024) as llm, bare(llm, ManualClock()) as cache:
        read(cache, 30)
        llama_cpp.llama_memory_seq_rm(llm._ctx.memory, 0, 20, -1)
        cache.cap_cells = 512
        with batch_of([(5, 20, 0)]) as batch:
            assert cache.decode(batch) == 0
        assert not cache.trusted
        assert cache.committed_cells == 1024
        cache.clear()
        read(cache, 30)
        assert cache.trusted
        assert cache.committed_cells == 512


def test_a_cache_that_nobody_needs_does_not_hold_on_to_the_model(default_model: Path) -> None:
    with opened(default_model, 256) as llm:
        cache = RebuiltCache(llm._ctx, settings=SMALL)
        alive = weakref.ref(cache)
        del cache
        assert alive() is None


def test_other_sequences_are_refused(default_model: Path) -> None:
    with opened(default_model, 512) as llm, bare(llm, ManualClock()) as cache:
        with pytest.raises(UsageError, match="sequence 0 only"):
            cache.seq_cp(0, 1, 0, -1)
        with pytest.raises(UsageError, match="sequence 0 only"):
            cache.seq_add(1, 0, -1, 1)
