"""What a pending question attends to, on a real model: its sentence stays, whatever else goes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from kv.contexts import Shape, batch_of, logits, open_context, open_model
from kvpsi.kv import CacheSettings, ElasticCache
from kvpsi.kv.layout import seq_state
from kvpsi.kv.policies import POLICIES, Auto, EvictionPolicy
from kvpsi.kv.questions import Questions
from kvpsi.kv.statedata import parse_state

pytestmark = pytest.mark.engine
SHAPE = Shape(n_ctx=1024, n_seq=3, n_batch=512, n_ubatch=512)
SETTINGS = CacheSettings(keep=4, tail=32, turn=64, min_prune=16)
FACT = "The code that opens the old iron gate is 48213."
HAY = [
    f"{who} walked along the {where} and thought of {what}."
    for who in ("The miller", "A young sailor", "My aunt")
    for where in ("river", "market street", "harbour wall", "edge of the forest", "garden path")
    for what in ("supper", "the weather")
]
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
ASK = "What is the code that opens the old iron gate?"


@pytest.fixture(scope="module")
def model(default_model: Path) -> Iterator[llama_cpp.llama_model_p]:
    with open_model(default_model) as opened:
        yield opened


@contextlib.contextmanager
def heeding(
    model: llama_cpp.llama_model_p, policy: EvictionPolicy | None = None, shape: Shape = SHAPE
) -> Iterator[tuple[ElasticCache, Questions]]:
    questions = Questions()

    def tapped(params: llama_cpp.llama_context_params) -> None:
        questions.tap.put_into(params)

    with open_context(model, shape, change=tapped) as ctx:
        cache = ElasticCache(ctx, settings=SETTINGS, policy=policy or Auto(), questions=questions)
        try:
            yield cache, questions
        finally:
            cache.close()


def tokens_of(model: llama_cpp.llama_model_p, text: str) -> list[int]:
    vocab = llama_cpp.llama_model_get_vocab(model)
    found = (ctypes.c_int32 * 4096)()
    n = llama_cpp.llama_tokenize(vocab, text.encode(), len(text.encode()), found, 4096, False, True)
    return list(found[:n])


def prompt(model: llama_cpp.llama_model_p, at: int = 12, ask: str = ASK) -> tuple[list[int], range]:
    """A chat with the fact after so many sentences, and the positions of the fact."""
    before = "<|im_start|>user\n" + " ".join(HAY[:at]) + " "
    after = " " + " ".join(HAY[at:]) + f" {ask}<|im_end|>\n<|im_start|>assistant\n"
    first, fact, last = (tokens_of(model, text) for text in (before, FACT, after))
    return first + fact + last, range(len(first), len(first) + len(fact))


def read(cache: ElasticCache, tokens: list[int], seq_id: int = 0, start: int = 0, piece: int = 512) -> None:
    for at in range(0, len(tokens), piece):
        some = [(t, start + at + i, seq_id) for i, t in enumerate(tokens[at : at + piece])]
        with batch_of(some, None if at + piece >= len(tokens) else ()) as batch:
            assert cache.decode(batch) == 0


def held(cache: ElasticCache, seq_id: int = 0) -> set[int]:
    return set(parse_state(seq_state(cache.ctx, seq_id))[0].positions)


def test_the_sentence_that_a_question_asks_for_is_attended_to_most(model: llama_cpp.llama_model_p) -> None:
    tokens, fact = prompt(model)
    with heeding(model) as (cache, questions):
        read(cache, tokens)
        assert questions.unscored
        cells = cache.trackers[0].mirror.streams[0]
        assert cache.score_questions(10.0) and not questions.unscored
        attention = questions.attention(cells.pos, range(3))
        assert attention is not None
        by_pos = attention[np.argsort(cells.pos[cells.cells_of(0)])]
        others = [by_pos[at : at + len(fact)].mean() for at in range(30, len(tokens) - 90, len(fact))]
        assert by_pos[fact].mean() > np.quantile(others, 0.95)
        assert cache.trusted


@pytest.mark.parametrize("at", [4, 15, 26])
def test_half_may_go_and_the_answer_is_still_known(model: llama_cpp.llama_model_p, at: int) -> None:
    tokens, fact = prompt(model, at)
    with heeding(model) as (cache, _):
        read(cache, tokens)
        assert cache.score_questions(10.0)
        cache.evict(len(tokens) // 2)
        kept = held(cache)
        assert set(fact) <= kept and len(kept) <= len(tokens) // 2 + 1 and cache.trusted


def test_without_a_question_the_oldest_go(model: llama_cpp.llama_model_p) -> None:
    tokens = tokens_of(model, " ".join(HAY))
    with heeding(model) as (cache, questions):
        read(cache, tokens)
        assert not questions.unscored
        cache.evict(len(tokens) // 2)
        assert min(held(cache) - set(range(SETTINGS.keep))) > len(tokens) // 2 - 60


def test_a_question_outlives_its_own_words(model: llama_cpp.llama_model_p) -> None:
    tokens, fact = prompt(model)
    with heeding(model) as (cache, _):
        read(cache, tokens)
        more = tokens_of(model, " ".join(HAY))[:200]
        for i, token in enumerate(more):  # the answer goes on, and on
            with batch_of([(token, len(tokens) + i, 0)]) as batch:
                assert cache.decode(batch) == 0
        cache.evict((len(tokens) + len(more)) // 2)
        assert set(fact) <= held(cache), "although the question is far from the end by now"


def test_what_comes_after_a_question_in_a_short_piece_does_not_hide_it(model: llama_cpp.llama_model_p) -> None:
    tokens, fact = prompt(model)
    with heeding(model) as (cache, questions):
        cut = len(tokens) - 3  # within the template's last words
        read(cache, tokens[:cut])
        read(cache, tokens[cut:], start=cut)
        assert questions.unscored and cache.score_questions(10.0)
        cache.evict(len(tokens) // 2)
        assert set(fact) <= held(cache)


def test_a_question_goes_with_its_sequence(model: llama_cpp.llama_model_p) -> None:
    tokens, _ = prompt(model)
    with heeding(model) as (cache, questions):
        read(cache, tokens)
        cache.seq_rm(0, len(tokens) - 100, -1)
        assert not questions.unscored
        read(cache, tokens[-100:], start=len(tokens) - 100)
        assert questions.unscored
        cache.clear()
        assert not questions.unscored and questions.attention(np.zeros(1, dtype=np.int32), range(3)) is None


def test_scores_come_bit_by_bit_while_memory_is_short_and_never_before(model: llama_cpp.llama_model_p) -> None:
    tokens, _ = prompt(model)
    with heeding(model) as (cache, questions):
        read(cache, tokens)
        for i in range(3):
            with batch_of([(100, len(tokens) + i, 0)]) as batch:
                assert cache.decode(batch) == 0
        assert not questions._scores, "nobody needs memory"
        cache.set_limit(cache.capacity_bytes - (1 << 20), None)
        n_decodes = 0
        while questions.unscored:
            with batch_of([(100, len(tokens) + 3 + n_decodes, 0)]) as batch:
                assert cache.decode(batch) == 0
            n_decodes += 1
        assert 2 <= n_decodes < 200


def test_nothing_is_shown_but_the_end_of_a_question(model: llama_cpp.llama_model_p) -> None:
    tokens, _ = prompt(model)
    with heeding(model) as (cache, questions):
        asked = 0
        see = questions.tap._wanted

        def counted(node: object) -> bool:
            nonlocal asked
            asked += 1
            return see(node)  # type: ignore[arg-type]

        questions.tap._wanted = counted
        read(cache, tokens[:250])
        assert asked == 0
        read(cache, tokens[250:], start=250)
        assert asked > 100
        asked = 0
        for i in range(4):
            with batch_of([(100, len(tokens) + i, 0)]) as batch:
                assert cache.decode(batch) == 0
        assert asked == 0


def test_the_logits_are_the_same_whether_a_question_is_read_or_not(model: llama_cpp.llama_model_p) -> None:
    tokens, _ = prompt(model)
    found = []
    for policy in ("auto", "streaming"):
        with heeding(model, POLICIES[policy]()) as (cache, questions):
            read(cache, tokens)
            assert questions.unscored == (policy == "auto")
            found.append(logits(cache.ctx))
    assert np.array_equal(*found)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_gives_whole_pages_and_the_model_goes_on(model: llama_cpp.llama_model_p, name: str) -> None:
    tokens, _ = prompt(model)
    with heeding(model, POLICIES[name]()) as (cache, _):
        read(cache, tokens)
        trim = cache.evict(len(tokens) // 2)
        assert trim.freed_cells >= len(tokens) // 2 and cache.trusted
        assert trim.release.returned_bytes >= 0.8 * trim.freed_cells * cache.bytes_per_cell
        kept = held(cache)
        assert set(range(SETTINGS.keep)) | set(range(len(tokens) - SETTINGS.tail, len(tokens))) <= kept
        with batch_of([(100, len(tokens), 0)]) as batch:
            assert cache.decode(batch) == 0 and cache.trusted


def test_streams_other_types_of_keys_and_no_flash_attention(model: llama_cpp.llama_model_p) -> None:
    tokens, fact = prompt(model)
    for shape in (
        replace(SHAPE, unified=False, n_ctx=3 * 1024),
        replace(SHAPE, kv_type=llama_cpp.GGML_TYPE_Q8_0),
        replace(SHAPE, flash=False),
    ):
        with heeding(model, shape=shape) as (cache, _):
            read(cache, tokens, seq_id=1)
            assert cache.score_questions(10.0)
            cache.evict(len(tokens) // 2)
            assert set(fact) <= held(cache, 1) and cache.trusted


def test_a_context_that_cannot_be_tapped_is_served_without(model: llama_cpp.llama_model_p) -> None:
    tokens, _ = prompt(model)
    with open_context(model, SHAPE) as ctx:
        cache = ElasticCache(ctx, settings=SETTINGS, policy=Auto(), questions=Questions())
        assert cache.questions is None
        read(cache, tokens)
        assert cache.evict(100).freed_cells >= 100
        cache.close()
