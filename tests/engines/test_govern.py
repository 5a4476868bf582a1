"""A governed `llama_cpp.Llama` answers as an ungoverned one does, through all of its public methods."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import itertools
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import kvpsi
import kvpsi.governor.law
import kvpsi.status
from kvpsi.engines import llama as engine
from kvpsi.engines.caches import make_rebuilt
from kvpsi.errors import CacheRefusedError, LayoutError, UsageError
from kvpsi.governor import ShareSettings
from kvpsi.kv import CacheSettings, RebuildSettings
from kvpsi.pressure import MonitorSettings
from kvpsi.pressure.fake import ScriptedSource, make_reading

pytestmark = pytest.mark.engine

CACHE = CacheSettings(keep=4, tail=32, min_prune=16)
STORY = "The lighthouse keeper wrote in his book every night what he had seen on the sea. "


@pytest.fixture(autouse=True)
def no_default_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_default_cache_limit", 1.0)


@pytest.fixture(scope="module")
def open_llama(default_model: Path) -> Callable[..., contextlib.AbstractContextManager[llama_cpp.Llama]]:
    @contextlib.contextmanager
    def opened(**options: Any) -> Iterator[llama_cpp.Llama]:
        settings: dict[str, Any] = {"n_ctx": 512, "n_batch": 128, "n_threads": 1, "n_threads_batch": 1, "seed": 1}
        llm = llama_cpp.Llama(str(default_model), verbose=False, **(settings | {"flash_attn": True} | options))
        try:
            yield llm
        finally:
            llm.close()

    return opened


Open = Callable[..., contextlib.AbstractContextManager[llama_cpp.Llama]]


def calm() -> ScriptedSource:
    return ScriptedSource([make_reading()])


def govern(llm: llama_cpp.Llama, **options: Any) -> kvpsi.GovernedLlama:
    options.setdefault("source", calm())
    options.setdefault("cache_settings", CACHE)
    return kvpsi.govern(llm, **options)


def answer(llm: llama_cpp.Llama, prompt: str, n: int = 8) -> str:
    done: Any = llm(prompt, max_tokens=n, temperature=0.0)
    return str(done["choices"][0]["text"])


# -- the same text through everything --------------------------------------------------------------------------------


def use_everything(llm: llama_cpp.Llama) -> list[Any]:
    """What a program may do with a model, and what it gets."""
    found: list[Any] = []
    found.append(answer(llm, "Once upon a time"))
    found.append(
        [
            c["choices"][0]["text"]
            for c in llm.create_completion("The capital of France is", max_tokens=8, temperature=0.0, stream=True)
        ]
    )  # type: ignore[union-attr,index]
    chat: Any = llm.create_chat_completion(
        [{"role": "user", "content": "Name a colour."}], max_tokens=8, temperature=0.0
    )
    found.append(chat["choices"][0]["message"]["content"])
    chat = llm.create_chat_completion(
        [{"role": "user", "content": "Name a colour."}], max_tokens=8, temperature=0.0, stream=True
    )
    found.append([c["choices"][0]["delta"].get("content") for c in chat])
    found.append(answer(llm, STORY + "He"))
    found.append(answer(llm, STORY + "He saw a"))  # a prefix of it is in the cache
    found.append(answer(llm, STORY + "He saw a"))  # all of it is
    found.append(llm("A dice shows", max_tokens=8, temperature=0.9, seed=7)["choices"][0]["text"])  # type: ignore[index]
    llm.reset()
    found.append(llm.n_tokens)
    tokens = llm.tokenize(STORY.encode())
    llm.eval(tokens)
    found.append(llm.sample(temp=0.0))
    state = llm.save_state()
    found.append((state.n_tokens, state.input_ids[: state.n_tokens].tolist()))
    generated = llm.generate(tokens, temp=0.0)
    found.append([next(generated) for _ in range(5)])
    generated.close()
    found.append(answer(llm, "Something else entirely"))
    llm.load_state(state)
    found.append((llm.n_tokens, llm.input_ids[: llm.n_tokens].tolist()))
    generated = llm.generate(tokens, temp=0.0)
    found.append([next(generated) for _ in range(5)])
    generated.close()
    llm.set_cache(llama_cpp.LlamaRAMCache())
    for prompt in (STORY, "Another one", STORY, STORY + "And then"):
        found.append(answer(llm, prompt))
    llm.set_cache(None)
    return found


@pytest.mark.parametrize("options", [{}, {"flash_attn": False}], ids=["flash", "no-flash"])
def test_everything_gives_what_stock_gives(open_llama: Open, options: dict[str, Any]) -> None:
    with open_llama(**options) as stock:
        expected = use_everything(stock)
    with open_llama(**options) as llm, govern(llm) as governed:
        assert use_everything(llm) == expected
        assert governed.cache.trusted, governed.cache.distrust_reason
        summary = governed.summary()
        assert summary.trusted and summary.trims == 0 and summary.releases > 0
        if options.get("flash_attn", True):  # else a page of V holds cells of many dimensions, in a cache so small
            assert summary.resident_bytes < 0.5 * summary.capacity_bytes


def test_logprobs_with_all_logits(open_llama: Open) -> None:
    def ask(llm: llama_cpp.Llama) -> Any:
        done: Any = llm("The sun rises in the", max_tokens=4, temperature=0.0, logprobs=3, echo=True)
        return done["choices"][0]["text"], done["choices"][0]["logprobs"]

    with open_llama(logits_all=True) as stock, open_llama(logits_all=True) as llm:
        expected = ask(stock)
        governed = govern(llm, source=ScriptedSource([make_reading(available_bytes=150 << 20, limit_bytes=1 << 30)]))
        assert governed.cache.max_chunk_tokens is None or governed.cache.max_chunk_tokens > 0
        governed.cache.max_chunk_tokens = 3
        assert ask(llm) == expected
        np.testing.assert_array_equal(llm.scores[: llm.n_tokens], stock.scores[: stock.n_tokens])
        assert governed.cache.trusted
        governed.close()


@pytest.mark.parametrize("pooling", [llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED, llama_cpp.LLAMA_POOLING_TYPE_MEAN])
def test_embeddings(open_llama: Open, pooling: int) -> None:
    with open_llama(embedding=True, pooling_type=pooling) as stock:
        expected = stock.embed([STORY, "short"])
    with open_llama(embedding=True, pooling_type=pooling) as llm, govern(llm) as governed:
        governed.cache.max_chunk_tokens = 4
        assert llm.embed([STORY, "short"]) == expected
        assert governed.cache.trusted and governed.cache.used_cells == 0


# -- states from before and after ------------------------------------------------------------------------------------


def test_a_state_saved_before_is_loaded_while_governed_and_the_reverse(open_llama: Open) -> None:
    prompt = STORY + "One night"
    with open_llama() as llm:
        expected = answer(llm, prompt)
        before = llm.save_state()
        with govern(llm) as governed:
            assert llm.n_tokens == before.n_tokens
            answer(llm, "Something else")
            llm.load_state(before)
            assert governed.cache.used_cells == governed.cache.first_gap(0) >= before.n_tokens - 1
            assert answer(llm, prompt) == expected
            during = llm.save_state()
            assert governed.cache.trusted
        answer(llm, "Something else")
        llm.load_state(during)
        assert llm.n_tokens == during.n_tokens
        assert answer(llm, prompt) == expected
        np.testing.assert_array_equal(
            before.input_ids[: before.n_tokens], during.input_ids[: before.n_tokens], strict=True
        )


def test_a_model_in_use_is_governed_without_losing_its_text(open_llama: Open) -> None:
    tokens = None
    with open_llama() as stock, open_llama() as llm:
        for each in (stock, llm):
            tokens = each.tokenize(STORY.encode())
            each.eval(tokens)
        with govern(llm) as governed:
            assert governed.cache.used_cells == len(tokens)
            assert governed.cache.first_gap(0) == len(tokens)
            for each in (stock, llm):
                each.eval(each.tokenize(b" Then", add_bos=False))
            assert llm.sample(temp=0.0) == stock.sample(temp=0.0)
            assert governed.cache.trusted


# -- limits ----------------------------------------------------------------------------------------------------------


def test_what_a_limit_made_it_forget_is_recomputed_when_it_is_lifted(open_llama: Open) -> None:
    prompt = STORY * 14 + "In the end he"
    with open_llama() as llm, govern(llm) as governed:
        cache = governed.cache
        expected = answer(llm, prompt)
        full, resident = cache.used_cells, cache.resident_bytes()
        assert 230 < full < 300
        kvpsi.set_cache_limit(0.2)
        assert cache.used_cells <= cache.floor_cells < full
        assert cache.resident_bytes() <= resident - 0.9 * (full - cache.used_cells - 4) * cache.bytes_per_cell
        assert cache.first_gap(0) == cache.used_cells == llm.n_tokens and governed.summary().trims == 0
        assert governed.summary().given_bytes["resting"] > 0
        answer(llm, prompt)  # works, with part of the text forgotten
        assert cache.used_cells <= cache.allowed_cells and governed.summary().trims >= 1
        assert governed.summary().given_bytes["forgotten"] > 0
        kvpsi.set_cache_limit(1.0)
        assert answer(llm, prompt) == expected
        assert cache.first_gap(0) == cache.used_cells >= full - 1, "no gap is left"
        assert cache.trusted


def rested(governed: kvpsi.GovernedLlama) -> int:
    """Have a model that has answered give what it can; the tokens that it holds then."""
    n_tokens = governed.llm.n_tokens
    governed.set_cache_limit(0.2)
    governed.set_cache_limit(1.0)
    assert governed.llm.n_tokens == governed.cache.used_cells < n_tokens
    assert governed.cache.forgotten_cells == 0
    return int(governed.llm.n_tokens)


@pytest.mark.parametrize("how", ["generate", "go on", "eval", "save_state", "heal"])
def test_what_went_while_it_rested_is_there_again_before_anything_else(open_llama: Open, how: str) -> None:
    prompt = STORY * 14 + "In the end he"
    with open_llama() as stock, open_llama() as llm, govern(llm) as governed:
        assert answer(llm, prompt) == answer(stock, prompt)
        n_tokens = llm.n_tokens
        left = rested(governed)
        if how == "generate":
            # it is evaluated again in other pieces, which are rounded in another way: no more than the first words
            assert answer(llm, prompt + " went", 2) == answer(stock, prompt + " went", 2)
        elif how == "go on":
            more = llm.tokenize(b" went", add_bos=False)
            found, expected = (list(itertools.islice(m.generate(more, temp=0.0, reset=False), 6)) for m in (llm, stock))
            assert found == expected
        elif how == "eval":
            for each in (llm, stock):
                each.eval(each.tokenize(b" went", add_bos=False))
            assert llm.n_tokens == stock.n_tokens and llm.sample(temp=0.0) == stock.sample(temp=0.0)
        elif how == "save_state":
            assert llm.save_state().n_tokens == n_tokens
        else:
            assert governed.heal() == n_tokens - left and governed.heal() == 0
        assert governed.cache.first_gap(0) == governed.cache.used_cells > left
        assert governed.cache.used_cells >= n_tokens or how == "generate", "which wrote less this time"
        assert governed.cache.trusted


def test_what_went_while_it_rested_is_not_wanted_after_a_reset(open_llama: Open) -> None:
    with open_llama() as stock, open_llama() as llm, govern(llm) as governed:
        answer(llm, STORY * 14)
        rested(governed)
        for each in (llm, stock):
            each.reset()
            each.eval(each.tokenize(b"Another story begins"))
        assert llm.n_tokens == stock.n_tokens and llm.sample(temp=0.0) == stock.sample(temp=0.0)
        assert governed.cache.used_cells == llm.n_tokens and governed.cache.trusted


def test_what_was_forgotten_is_healed(open_llama: Open) -> None:
    with open_llama() as stock, open_llama() as llm, govern(llm) as governed:
        for each in (llm, stock):
            each.eval(each.tokenize((STORY * 14).encode()))
        governed.set_cache_limit(0.2)
        assert governed.heal() == 0, "there is no room"
        governed.set_cache_limit(1.0)
        gap = governed.cache.first_gap(0)
        assert governed.heal() == llm.n_tokens - gap and governed.cache.first_gap(0) == llm.n_tokens
        assert llm.sample(temp=0.0) == stock.sample(temp=0.0)
        assert governed.cache.trusted


def test_going_on_without_a_reset_keeps_what_is_left(open_llama: Open) -> None:
    with open_llama() as llm, govern(llm) as governed:
        tokens = llm.tokenize((STORY * 14).encode())
        llm.eval(tokens)
        governed.set_cache_limit(0.2)
        governed.set_cache_limit(1.0)
        used, gap = governed.cache.used_cells, governed.cache.first_gap(0)
        assert gap < len(tokens)
        following = llm.generate(llm.tokenize(b" Then", add_bos=False), temp=0.0, reset=False)
        next(following)
        following.close()
        assert llm.n_tokens > len(tokens), "the tokens that were given continue the text, they do not replace it"
        assert governed.cache.used_cells > used


def test_a_limit_from_the_start_holds_for_models_to_come(open_llama: Open) -> None:
    kvpsi.set_cache_limit(0.5)
    with open_llama() as llm, govern(llm) as governed:
        answer(llm, STORY * 14 + "In the end he")
        assert governed.cache.used_cells <= 256
        assert governed.summary().limit_bytes == 256 * governed.cache.bytes_per_cell
        assert governed.cache.trusted


def test_a_refusal_reaches_the_caller_and_the_model_goes_on(open_llama: Open) -> None:
    settings = CacheSettings(keep=4, tail=100, min_prune=16)
    with open_llama(n_batch=512) as llm, govern(llm, cache_settings=settings) as governed:
        governed.set_cache_limit(0.1)
        tokens = llm.tokenize((STORY * 20).encode())
        assert len(tokens) > governed.cache.allowed_cells
        llm._logits_all = True  # several outputs: a batch that cannot be cut
        with pytest.raises(CacheRefusedError):
            llm.eval(tokens)
        llm._logits_all = False
        llm.reset()
        governed.set_cache_limit(1.0)
        assert answer(llm, "Once upon a time")
        assert governed.cache.trusted


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_share_that_makes_no_sense_is_refused_and_changes_nothing(share: float) -> None:
    with pytest.raises(UsageError, match="makes no sense"):
        kvpsi.set_cache_limit(share)
    assert engine._default_cache_limit == 1.0


@pytest.mark.parametrize("share", ["70%", "0.7", None, [0.5], 1j])
def test_a_limit_that_is_no_number_is_refused_in_a_sentence(share: Any) -> None:
    with pytest.raises(UsageError, match="is a number above 0 and at most 1") as caught:
        kvpsi.set_cache_limit(share)
    assert "\n" not in str(caught.value) and engine._default_cache_limit == 1.0


@pytest.mark.parametrize("wrong", [{"keep": -1}, {"tail": -1}, {"min_prune": 0}, {"min_prune": -5}])
def test_cache_settings_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError) as caught:
        CacheSettings(**wrong)
    assert next(iter(wrong)) in str(caught.value)


# -- attaching and undoing -------------------------------------------------------------------------------------------


def attributes(llm: llama_cpp.Llama) -> tuple[dict[str, Any], set[str]]:
    return dict(vars(llm._ctx)), set(vars(llm))


def threads() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("kvpsi")}


def test_closing_puts_everything_back(open_llama: Open) -> None:
    with open_llama() as llm:
        before, running = attributes(llm), threads()
        source = calm()
        with govern(llm, source=source) as governed:
            assert attributes(llm) != before
            assert len(threads()) == len(running) + 1
            expected = answer(llm, STORY)
        assert attributes(llm) == before
        assert threads() == running and source.closed
        governed.close()
        assert answer(llm, "Something else") and answer(llm, STORY) == expected
        with govern(llm) as again:
            assert answer(llm, STORY) == expected
            assert again.cache.trusted
        assert attributes(llm) == before


def test_an_error_inside_the_with_block_is_not_swallowed_and_all_is_undone(open_llama: Open) -> None:
    with open_llama() as llm:
        before = attributes(llm)
        with pytest.raises(ZeroDivisionError), govern(llm):
            raise ZeroDivisionError
        assert attributes(llm) == before


def test_a_model_is_governed_once(open_llama: Open) -> None:
    with open_llama() as llm, govern(llm):
        with pytest.raises(UsageError, match="governed already"):
            govern(llm)
        assert answer(llm, "Once upon a time")


def test_closing_the_model_ends_its_governing(open_llama: Open) -> None:
    running, source = threads(), calm()
    with open_llama() as llm:
        governed = govern(llm, source=source)
        answer(llm, "Once", 2)
        llm.close()
        assert threads() == running and source.closed
        governed.close()


def test_what_was_governed_is_let_go_before_the_model_is_closed(open_llama: Open) -> None:
    with open_llama() as llm:
        governed = govern(llm)
        gone = weakref.ref(governed)
        governed.close()
        del governed
        gc.collect()
        assert gone() is None
        assert answer(llm, "Once", 2)


def test_a_model_that_is_dropped_ends_its_governor_with_its_context(default_model: Path) -> None:
    running = threads()
    llm = llama_cpp.Llama(str(default_model), verbose=False, n_ctx=512, n_threads=1, flash_attn=True)
    governed = govern(llm, source=calm())
    assert threads() > running
    del llm, governed
    gc.collect()
    assert threads() == running, "it would act on a context that is freed"


def test_settings_reach_the_monitor_and_the_rebuilding(open_llama: Open) -> None:
    pace, looks = RebuildSettings(min_interval_s=7.0), MonitorSettings(max_interval_s=0.25)
    with open_llama() as llm, govern(llm, monitor=looks, rebuild=pace) as governed:
        assert governed.governor.monitor._settings is looks
        assert governed.cache.mode == "pages"
    made = engine._maker(pace)
    assert isinstance(made, functools.partial) and made.keywords == {"pace": pace}
    with open_llama() as llm, govern(llm, make=functools.partial(make_rebuilt, pace=pace)) as governed:
        assert governed.cache.mode == "rebuild" and governed.cache.pace is pace  # type: ignore[attr-defined]


def test_a_state_that_does_not_fit_leaves_the_model_as_it_was(open_llama: Open) -> None:
    with open_llama() as llm, govern(llm) as governed:
        llm.eval(llm.tokenize((STORY * 20).encode()))
        large = llm.save_state()
        llm.reset()
        llm._ctx.kv_cache_clear()
        llm.eval(llm.tokenize(STORY.encode()))
        n_tokens, following = llm.n_tokens, llm.sample(temp=0.0)
        governed.set_cache_limit(0.5)
        assert large.n_tokens > governed.cache.allowed_cells
        with pytest.raises(CacheRefusedError, match="cache limit"):
            llm.load_state(large)
        assert llm.n_tokens == n_tokens == governed.cache.used_cells
        assert llm.sample(temp=0.0) == following
        governed.set_cache_limit(1.0)
        llm.load_state(large)
        assert llm.n_tokens == large.n_tokens == governed.cache.used_cells and governed.cache.trusted


def test_a_source_that_does_not_work_leaves_the_model_as_it_was(open_llama: Open) -> None:
    with open_llama() as llm:
        before, running = attributes(llm), threads()
        with pytest.raises(OSError, match="nothing to read"):
            govern(llm, source=ScriptedSource([OSError("nothing to read")]))
        assert attributes(llm) == before and threads() == running
        with govern(llm) as governed:
            assert answer(llm, "Once", 2) and governed.cache.trusted


def test_a_model_with_several_sequences_in_use_is_refused_and_unchanged(open_llama: Open) -> None:
    with open_llama(embedding=True) as llm:
        before = attributes(llm)
        if llama_cpp.llama_n_seq_max(llm.ctx) < 2:
            pytest.skip("this llama-cpp-python opens contexts for one sequence only")
        batch = llama_cpp.llama_batch_init(1, 0, 1)
        batch.n_tokens, batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.logits[0] = 1, 100, 0, 1, 1
        batch.seq_id[0][0] = 1
        assert llama_cpp.llama_decode(llm.ctx, batch) == 0
        llama_cpp.llama_batch_free(batch)
        with pytest.raises(LayoutError, match="several sequences"):
            govern(llm)
        assert attributes(llm) == before


# -- the package -----------------------------------------------------------------------------------------------------


def test_every_exported_name_is_there() -> None:
    for name in kvpsi.__all__:
        assert getattr(kvpsi, name).__module__.startswith("kvpsi")
    assert set(kvpsi.__all__) == set(kvpsi._HOME)
    assert sorted(kvpsi.__all__) == kvpsi.__all__
    with pytest.raises(AttributeError, match="no_such_thing"):
        kvpsi.no_such_thing  # noqa: B018


def test_the_cache_does_not_import_who_decides_about_it() -> None:
    for file in Path(kvpsi.__file__).parent.glob("kv/**/*.py"):
        assert "kvpsi.governor" not in re.sub(r'"""(.|\n)*?"""', "", file.read_text()), file.name
    assert kvpsi.governor.CacheStatus is kvpsi.governor.law.CacheStatus is kvpsi.status.CacheStatus


@pytest.mark.parametrize("name", ["kvpsi.governor", "kvpsi.kv", "kvpsi.kv.policies", "kvpsi.pressure", "kvpsi.models"])
def test_every_name_that_a_package_promises_is_there(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__all__ and all(hasattr(package, each) for each in package.__all__)


def test_two_models_of_one_process_share_and_leave_no_record(
    open_llama: Callable[..., contextlib.AbstractContextManager[llama_cpp.Llama]], tmp_path: Path
) -> None:
    folder = str(tmp_path)
    with open_llama() as one, open_llama() as two:
        with (
            kvpsi.govern(one, share=ShareSettings(2, folder=folder)) as first,
            kvpsi.govern(two, share=ShareSettings(folder=folder)),
        ):
            assert len(list(tmp_path.iterdir())) == 2
            deadline = time.monotonic() + 20
            while (decision := first.governor.decision) is None or decision.share is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert (decision.share.weight, decision.share.weights) == (2, 3)
        assert list(tmp_path.iterdir()) == []
