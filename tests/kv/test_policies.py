"""All policies go through the same: whatever they are shown, they choose what may go, and enough of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpsi.errors import UsageError
from kvpsi.kv.cells import StreamCells
from kvpsi.kv.policies import (
    POLICIES,
    Attention,
    Auto,
    CellView,
    EvictionPolicy,
    KeyDiff,
    LeastRecentlyUsed,
    Streaming,
    policy_named,
)
from kvpsi.kv.policies.base import view_of

every_policy = pytest.mark.parametrize("name", list(POLICIES))


class FakeKeys:
    """Keys drawn by chance, of two heads in three layers."""

    n_layers, n_heads = 3, 2

    def __init__(self, n_cells: int) -> None:
        self._values = np.random.default_rng(1).standard_normal((3, n_cells, 2, 8)).astype(np.float32)

    def layer(self, index: int, cells: np.ndarray, head: int | None = None) -> np.ndarray:
        found = self._values[index][cells]
        return found if head is None else found[:, head]


class FakeVocabulary:
    """Every eleventh token ends a sentence, and token 40 a turn."""

    def ends_sentence(self, tokens: np.ndarray) -> np.ndarray:
        return tokens % 11 == 0

    def ends_turn(self, tokens: np.ndarray) -> np.ndarray:
        return tokens == 40


def held(lengths: list[int], n_cells: int = 0) -> StreamCells:
    """Sequences of these lengths, one after the other."""
    cells = StreamCells(n_cells or sum(lengths) + 8, len(lengths))
    for seq_id, n in enumerate(lengths):
        found = cells.find(n)
        assert found is not None
        cells.place(found, np.arange(n, dtype=np.int32), [(seq_id,)] * n, np.arange(n, dtype=np.int32) % 50)
    return cells


def view(
    lengths: list[int], *, keep: int = 4, tail: int = 8, turn: int = 0, block_cells: int = 16, asked: bool = False
) -> CellView:
    cells = held(lengths)
    attention = np.random.default_rng(2).random(cells.n_cells) if asked else None
    if attention is not None:
        attention[::7] = np.nan
    return view_of(
        cells,
        keep=keep,
        tail=tail,
        turn=turn,
        block_cells=block_cells,
        used_at=np.arange(len(lengths), 0, -1),
        keys=FakeKeys(cells.n_cells),  # type: ignore[arg-type]
        vocabulary=FakeVocabulary(),  # type: ignore[arg-type]
        attention=attention,
    )


@every_policy
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    wanted=st.integers(-5, 400),
    keep=st.integers(0, 20),
    tail=st.integers(0, 40),
    turn=st.integers(0, 60),
    block_cells=st.sampled_from([1, 16, 48]),
    asked=st.booleans(),
)
def test_what_it_chooses_may_go_and_is_enough(
    name: str, lengths: list[int], wanted: int, keep: int, tail: int, turn: int, block_cells: int, asked: bool
) -> None:
    shown = view(lengths, keep=keep, tail=tail, turn=turn, block_cells=block_cells, asked=asked)
    chosen = POLICIES[name]().choose(shown, wanted)
    assert shown.evictable[chosen].all() and len(np.unique(chosen)) == len(chosen)
    assert len(chosen) >= min(wanted, int(shown.evictable.sum()))
    if wanted > 0:
        assert len(chosen) < wanted + 48, "no more than the rest of a block or sentence"
    assert np.array_equal(chosen, POLICIES[name]().choose(shown, wanted)), "the same again"


@every_policy
def test_it_goes_without_keys_texts_and_questions(name: str) -> None:
    bare = replace(view([200]), keys=None, vocabulary=None, attention=None)
    assert len(POLICIES[name]().choose(bare, 64)) >= 64


@every_policy
def test_a_policy_is_a_score_and_perhaps_a_choice(name: str) -> None:
    own = {n for n, each in vars(POLICIES[name]).items() if callable(each) and not n.startswith("_")}
    assert own <= {"score", "choose"} and issubclass(type(POLICIES[name]()), EvictionPolicy)


@every_policy
def test_the_first_turn_and_the_one_that_is_answered_stay(name: str) -> None:
    shown = view([200], turn=64)  # turns end at 40, 90, 140 and 190
    gone = shown.pos[POLICIES[name]().choose(shown, 200)]
    assert sorted(gone.tolist()) == [*range(41, 141), 191], "all but the first turn, the last one and the tail"
    shown = view([200], turn=10)
    gone = shown.pos[POLICIES[name]().choose(shown, 200)]
    assert sorted(gone.tolist()) == [*range(10, 181), 191], "of long turns, the beginning and the end"


@pytest.mark.parametrize("policy", [Attention(), KeyDiff()])
def test_sentences_that_lie_together_go_together(policy: EvictionPolicy) -> None:
    shown = view([2000])
    worth = np.random.default_rng(5).random(shown.segments.max() + 1)[shown.segments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(policy), "score", lambda *_: worth)
        chosen = np.sort(policy.choose(shown, 500))
    cheapest = np.sort(np.unique(worth[shown.evictable]))
    assert 500 <= len(chosen) < 500 + 48
    assert worth[chosen].max() <= cheapest[int(0.45 * len(cheapest))], "none of those that matter most"
    n_runs = 1 + np.count_nonzero(np.diff(chosen) != 1)
    assert len(chosen) / n_runs > 18, "the cheapest 500 would be in runs of 15"


def test_streaming_forgets_the_oldest() -> None:
    shown = view([200])
    assert shown.pos[Streaming().choose(shown, 32)].max() < 48


def test_lru_forgets_the_sequence_that_was_not_used_for_longest() -> None:
    shown = view([100, 100, 100], block_cells=4)  # the first was used last
    assert shown.owner[LeastRecentlyUsed().choose(shown, 60)].argmax(axis=1).tolist() == [2] * 60


def test_a_question_keeps_what_it_attends_to_and_the_most_recent() -> None:
    shown = view([400])
    attention = np.full(len(shown.pos), 1e-6)
    attention[(shown.pos >= 100) & (shown.pos < 140)] = 0.5
    shown = replace(shown, attention=attention)
    for policy in (Attention(), Auto()):
        kept = np.setdiff1d(np.flatnonzero(shown.evictable), policy.choose(shown, 250))
        assert set(range(106, 134)) <= set(shown.pos[kept].tolist())
        assert set(range(345, 392)) <= set(shown.pos[kept].tolist())
    assert not set(range(106, 134)) <= set(
        shown.pos[np.setdiff1d(np.flatnonzero(shown.evictable), Streaming().choose(shown, 250))].tolist()
    )


def test_auto_without_a_question_is_streaming() -> None:
    shown = view([300])
    assert np.array_equal(Auto().choose(shown, 100), Streaming().choose(shown, 100))


def test_keydiff_forgets_what_is_alike() -> None:
    shown = view([200], keep=0, tail=0)
    keys = FakeKeys(len(shown.pos))
    keys._values[:, 50:150] = 1.0  # all the same
    chosen = KeyDiff().choose(replace(shown, keys=keys), 60)  # type: ignore[arg-type]
    assert set(shown.pos[chosen].tolist()) <= set(range(40, 160))


def test_a_policy_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UsageError, match="auto, streaming, lru"):
        policy_named("best")
    assert isinstance(policy_named("attention"), Attention)
