"""The bench of answers that are the same: its arithmetic, and one small real run."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from kvpsi.bench.answers.play import Played
from kvpsi.bench.answers.run import Plan, Row, _row, conversation, figures_of, run
from kvpsi.bench.prompts import draw
from kvpsi.board import BoardSettings
from kvpsi.errors import UsageError
from kvpsi.hog import HogSettings
from support.boards import left_behind

MIB = 1 << 20


def row(variant: str, same: int, **changes: Any) -> Row:
    told: dict[str, Any] = {"forgotten_tokens": 0, "model_killed": False, "hog_killed": False, "given_bytes": {}}
    return Row(variant, 0, 20, same, same / 20, 1.0, 0.5, **(told | changes))


def test_answers_count_that_are_the_same_from_the_second_turn_on() -> None:
    expected = [[[1], [2], [3]], [[4], [5], [6]]]
    beside = Played({(0, 0): [9], (0, 1): [2], (0, 2): [7], (1, 1): [5]}, [1.0, 2.0, 3.0])
    found = _row("prune", 0, expected, Played(seconds=[0.5]), beside)
    assert (found.answers, found.same, found.same_share) == (4, 2, 0.5)
    assert found.model_killed, "it did not get to its end, and the answer that is missing is not the same"


def test_only_the_ladder_has_something_to_reach() -> None:
    found = {f.name: f for f in figures_of([row("ladder", 19), row("ladder", 18), row("prune", 3, hog_killed=True)])}
    assert found["ladder.same_share"].value == 37 / 40 and found["ladder.same_share"].met is False
    assert found["ladder.killed"].met is True and found["prune.same_share"].met is None
    assert found["prune.killed"].value == 1
    assert figures_of([row("ladder", 20, forgotten_tokens=1)])[1].met is False


def test_questions_are_about_persons_in_the_text() -> None:
    text = draw(1, 3, 8)[0]
    first, *questions = conversation(text, 4, random.Random(1))
    assert text in first and len(questions) == 3
    for question in questions:
        person = next(word for word in question.replace("?", " ").replace(".", " ").split() if word.isdigit())
        assert f"Person {person} " in text


@pytest.mark.parametrize(
    "wrong",
    [{"variants": ()}, {"variants": ("stock",)}, {"n_turns": 1}, {"n_predict": 0}, {"n_ctx": 512}, {"rounds": 0}],
)
def test_plans_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Plan(Path("m.gguf"), **wrong)


@pytest.mark.engine
@pytest.mark.pressure
@pytest.mark.usefixtures("board_places")
def test_a_small_run(default_model: Path, tmp_path: Path, board_places: Any) -> None:
    plan = Plan(
        default_model,
        n_conversations=2,
        n_turns=2,
        n_sentences=8,
        n_predict=4,
        n_ctx=1024,
        board=BoardSettings(500 * MIB, swap="zram"),
        hog=HogSettings(100 * MIB, shape="pulse", period_s=2.0),
    )
    document = run(plan, tmp_path, lambda _: None)
    assert [each["variant"] for each in document["runs"]] == ["ladder", "streaming", "prune"]
    assert all(each["answers"] == 2 and not each["model_killed"] for each in document["runs"])
    assert document["figures"][0]["name"] == "ladder.same_share" and document["figures"][0]["met"]
    assert document["raw"] == [str(tmp_path / "answers.csv")]
    assert not left_behind(board_places, os.getpid())
