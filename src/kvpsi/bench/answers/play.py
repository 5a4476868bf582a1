"""Runs one model once on a fresh board: all conversations, with a neighbour from their second turns on, or without."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvpsi.bench.answers.models import Variant
from kvpsi.bench.conversation import forget_cached_pages
from kvpsi.bench.lines import said
from kvpsi.bench.processes import must_have_been_killed
from kvpsi.board import BoardSettings, open_board
from kvpsi.hog import Hog, HogReport, HogSettings

Answers = list[list[list[int]]]
"""The tokens of each answer, by conversation and turn."""


@dataclass(frozen=True, slots=True)
class Script:
    """What is asked, and where.

    Attributes:
        model: the GGUF file.
        turns: the tokens that each turn of each conversation adds.
        n_predict: tokens of each answer.
        n_ctx: tokens of all conversations together.
        board: the machine that model and neighbour share.
        hog: the neighbour; it stays until the model is done.
        spill_dir: where conversations may be parked.
    """

    model: Path
    turns: Answers
    n_predict: int
    n_ctx: int
    board: BoardSettings
    hog: HogSettings
    spill_dir: Path


@dataclass(slots=True)
class Played:
    """What came of it; ``figures`` is None where the model was killed."""

    answers: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    figures: dict[str, Any] | None = None
    hog: HogReport | None = None
    kills: int = 0


def play(script: Script, variant: Variant, expected: Answers | None) -> Played:
    """Run it: beside the neighbour if it is known what is to be said, else without one.

    Raises:
        EnvironmentProblem: no board can be made here.
        KvpsiError: the model failed without having been killed.
    """
    played, hog = Played(), None
    forget_cached_pages(script.model)
    with open_board(script.board) as board, tempfile.TemporaryDirectory(dir=script.spill_dir) as spill:
        told = {
            "variant": variant,
            "model": str(script.model),
            "n_ctx": script.n_ctx,
            "n_predict": script.n_predict,
            "turns": script.turns,
            "expected": expected,
            "pressure_file": str(board.pressure_file()),
            "spill_dir": spill,
        }
        command = [sys.executable, "-m", "kvpsi.bench.answers.subject", json.dumps(told)]
        process = board.start(command, group="model", stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                what, value = said(line)
                if what == "answer":
                    conversation, turn, tokens, seconds = value
                    played.answers[conversation, turn] = tokens
                    if turn:
                        played.seconds.append(seconds)
                elif what == "pressure" and expected is not None:
                    hog = Hog(
                        replace(script.hog, hold_s=3600.0),
                        lambda command: board.start(command, group="hog", stdout=subprocess.PIPE),
                    )
                elif what == "done":
                    played.figures = value
        if hog is not None:
            hog.end()
            played.hog = hog.wait()
        if played.figures is None:
            must_have_been_killed(process)
        process.wait()
        played.kills = board.figures().kills
    return played
