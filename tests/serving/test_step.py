"""What goes into one decode."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from kvpsi.serving.step import EVEN_PIECE_TOKENS, Turn, plan


@dataclass(eq=False)
class Sequence:
    left: int
    one_by_one: bool = False
    read_at: int = 0

    @property
    def left_at_once(self) -> int:
        return min(1, self.left) if self.one_by_one else self.left


def test_everybody_who_writes_gets_a_token_and_prompts_take_turns_with_them() -> None:
    writing, long, short = [Sequence(1), Sequence(1)], Sequence(1000), Sequence(20)
    waiting = [long, *writing, short]
    answers = plan(waiting, most_tokens=512, most_beside=128, turn=Turn.ANSWERS)
    assert [(p.sequence, p.n_tokens, p.ends) for p in answers] == [(writing[0], 1, True), (writing[1], 1, True)]
    prompts = plan(waiting, most_tokens=512, most_beside=128, turn=Turn.PROMPTS)
    assert [(p.sequence, p.n_tokens, p.ends) for p in prompts] == [(long, 128, False)]


def test_what_is_read_again_one_by_one_goes_with_the_answers() -> None:
    writing, again, prompt = Sequence(1), Sequence(300, one_by_one=True), Sequence(200)
    parts = plan([prompt, again, writing], most_tokens=512, most_beside=128, turn=Turn.ANSWERS)
    assert [(p.sequence, p.n_tokens, p.ends) for p in parts] == [(again, 1, False), (writing, 1, True)]


def test_prompts_are_read_together_where_nobody_writes() -> None:
    first, second = Sequence(300), Sequence(500)
    for turn in Turn:
        parts = plan([first, second], most_tokens=512, most_beside=128, turn=turn)
        assert [(p.sequence, p.n_tokens, p.ends) for p in parts] == [(first, 300, True), (second, 212, False)]


def test_answers_wait_for_nobody_where_no_prompt_is_left() -> None:
    writing = Sequence(1)
    parts = plan([writing, Sequence(0)], most_tokens=512, most_beside=128, turn=Turn.PROMPTS)
    assert [(p.sequence, p.n_tokens, p.ends) for p in parts] == [(writing, 1, True)]


def test_prompts_that_were_read_longest_ago_go_first_and_no_piece_is_short() -> None:
    writing, long, short = Sequence(1), Sequence(1000, read_at=7), Sequence(60, read_at=3)
    parts = plan([long, writing, short], most_tokens=512, most_beside=64, turn=Turn.PROMPTS)
    assert [(p.sequence, p.n_tokens) for p in parts] == [(short, 60)], "4 tokens of the long one would be too few"
    whole = plan([writing, Sequence(100)], most_tokens=512, most_beside=64, turn=Turn.PROMPTS)
    assert [p.n_tokens for p in whole] == [100], "64 and 36 would be read in another way than all together"


def test_a_turn_of_short_prompts_is_one_of_answers_if_all_are_long() -> None:
    writing, long, short = Sequence(1), Sequence(128), Sequence(127)
    parts = plan([writing, long], most_tokens=512, most_beside=64, turn=Turn.SHORT_PROMPTS)
    assert [p.sequence for p in parts] == [writing]
    parts = plan([writing, long, short], most_tokens=512, most_beside=64, turn=Turn.SHORT_PROMPTS)
    assert [p.sequence for p in parts] == [short]


@given(st.integers(64, 3000), st.integers(128, 512))
def test_no_piece_of_a_prompt_is_so_short_that_it_would_be_rounded_in_another_way(n_tokens: int, most: int) -> None:
    prompt, pieces = Sequence(n_tokens), []
    while prompt.left:
        pieces += [p.n_tokens for p in plan([prompt], most, most, turn=Turn.ANSWERS)]
        prompt.left -= pieces[-1]
    assert min(pieces) >= EVEN_PIECE_TOKENS and sum(pieces) == n_tokens


@given(st.lists(st.integers(0, 700), max_size=12), st.integers(1, 512), st.integers(1, 512), st.sampled_from(Turn))
def test_it_never_takes_more_than_it_may(left: list[int], most: int, beside: int, turn: Turn) -> None:
    sequences = [Sequence(n) for n in left]
    parts = plan(sequences, most, beside, turn)
    assert sum(p.n_tokens for p in parts) <= most
    assert all(0 < p.n_tokens <= p.sequence.left and p.ends == (p.n_tokens == p.sequence.left) for p in parts)
    assert bool(parts) == any(left), "there is always something to do"
    assert len({p.sequence.left == 1 for p in parts}) <= 1, "answers and prompts are not mixed"
    if any(n == 1 for n in left):
        assert sum(p.n_tokens for p in parts if p.sequence.left > 1) <= max(beside, 2 * EVEN_PIECE_TOKENS - 1)
