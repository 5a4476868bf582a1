"""What goes into one decode."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from kvpsi.serving.step import plan


@dataclass(eq=False)
class Sequence:
    left: int


def test_everybody_who_writes_gets_a_token_and_prompts_the_rest() -> None:
    writing, long, short = [Sequence(1), Sequence(1)], Sequence(1000), Sequence(20)
    parts = plan([long, *writing, short], most_tokens=512, most_beside=128)
    assert [(p.sequence, p.n_tokens, p.ends) for p in parts] == [
        (writing[0], 1, True),
        (writing[1], 1, True),
        (long, 128, False),
    ]


def test_prompts_are_read_together_where_nobody_writes() -> None:
    first, second = Sequence(300), Sequence(500)
    parts = plan([first, second], most_tokens=512, most_beside=128)
    assert [(p.sequence, p.n_tokens, p.ends) for p in parts] == [(first, 300, True), (second, 212, False)]


@given(st.lists(st.integers(0, 700), max_size=12), st.integers(1, 512), st.integers(1, 512))
def test_it_never_takes_more_than_it_may(left: list[int], most: int, beside: int) -> None:
    sequences = [Sequence(n) for n in left]
    parts = plan(sequences, most, beside)
    assert sum(p.n_tokens for p in parts) <= most
    assert all(0 < p.n_tokens <= p.sequence.left and p.ends == (p.n_tokens == p.sequence.left) for p in parts)
    assert bool(parts) == any(left), "there is always something to do"
    if any(n == 1 for n in left):
        assert sum(p.n_tokens for p in parts if p.sequence.left > 1) <= beside
