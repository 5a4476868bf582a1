"""How often prompts are read beside answers."""

from __future__ import annotations

import pytest

from kvpsi.serving.pace import Pace
from kvpsi.serving.step import EVEN_PIECE_TOKENS, Turn

ANSWER_S, PIECE_S = 0.010, 0.200


def play(pace: Pace, steps: int, *, long: bool) -> list[str]:
    """What is decoded, one after the other, while somebody writes and a prompt without end is there."""
    done = []
    for _ in range(steps):
        turn = pace.turn()
        if turn is Turn.PROMPTS or (turn is Turn.SHORT_PROMPTS and not long):
            pace.note_prompts(EVEN_PIECE_TOKENS, PIECE_S, beside=True, is_long=True)
            done.append("prompt")
        else:
            pace.note_answers(ANSWER_S)
            done.append("answer")
    return done


@pytest.mark.parametrize("stretch", [1.25, 1.5, 2.0])
def test_prompts_get_their_share_of_the_time_and_no_more(stretch: float) -> None:
    done = play(Pace(stretch), 20_000, long=False)
    prompts = done.count("prompt")
    share = prompts * PIECE_S / (len(done) - prompts) / ANSWER_S
    assert share == pytest.approx(stretch - 1, rel=0.05)


def test_pieces_of_a_long_prompt_keep_their_distance() -> None:
    done = play(Pace(100.0), 5000, long=True)
    gaps = "".join("p" if each == "prompt" else "a" for each in done).split("p")
    assert min(map(len, gaps[1:-1])) >= 30, "so 95 of 100 tokens come at the usual pace"


def test_the_first_prompt_beside_answers_is_read_at_once() -> None:
    pace = Pace(1.5)
    pace.note_prompts(EVEN_PIECE_TOKENS, PIECE_S, beside=False, is_long=True)
    pace.note_answers(ANSWER_S)
    assert pace.turn() is Turn.PROMPTS
    pace.note_prompts(EVEN_PIECE_TOKENS, PIECE_S, beside=True, is_long=True)
    pace.note_prompts(EVEN_PIECE_TOKENS, PIECE_S, beside=True, is_long=True)
    for _ in range(20):
        pace.note_answers(ANSWER_S)
        assert pace.turn() is Turn.ANSWERS


def test_without_a_pace_the_two_take_turns() -> None:
    done = play(Pace(0), 100, long=True)
    assert done.count("prompt") == 50


def test_the_time_for_a_token_follows() -> None:
    pace = Pace(1.5)
    assert pace.token_s is None
    for _ in range(300):
        pace.note_answers(0.01)
    assert pace.token_s == pytest.approx(0.01)
    for _ in range(60):
        pace.note_answers(0.1)
    assert pace.token_s == pytest.approx(0.1, rel=0.05)


def test_short_prompts_that_keep_coming_do_not_keep_long_ones_from_being_read() -> None:
    pace = Pace(2.0)
    pace.note_prompts(EVEN_PIECE_TOKENS, PIECE_S, beside=False, is_long=True)
    pieces, since = 0, []
    for _ in range(400):
        for _ in range(9):  # a short prompt every nine tokens
            pace.note_answers(4 * ANSWER_S)
            since.append(pieces)
            if pace.turn() is Turn.PROMPTS:
                pieces += 1
                pace.note_prompts(EVEN_PIECE_TOKENS, PIECE_S, beside=True, is_long=True)
        pace.note_prompts(10, PIECE_S / 8, beside=True, is_long=False)
    assert pieces > 20
    assert max(since.count(n) for n in range(1, pieces)) <= 100, "it has its turn after 90 tokens at last"


def test_the_first_of_many_does_not_keep_all_others_waiting() -> None:
    pace = Pace(2.0)
    pace.note_prompts(EVEN_PIECE_TOKENS, PIECE_S, beside=False, is_long=False)
    tokens = 0
    for n_writing in range(1, 4):  # eight came together; each prompt is one piece
        while pace.turn() is Turn.ANSWERS:
            pace.note_answers(ANSWER_S, others_each=(8 - n_writing) / n_writing)
            tokens += 1
        pace.note_prompts(EVEN_PIECE_TOKENS, PIECE_S, beside=True, is_long=False)
    assert tokens <= 1.2 * PIECE_S / ANSWER_S, "with equal shares of the time it would be three times"
