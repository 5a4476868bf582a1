"""Runs one variant once: a fresh board, the model, its prompt, a calm stretch, and the same with the neighbour."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvpsi.bench.conversation import Conversation, forget_cached_pages
from kvpsi.bench.lines import said
from kvpsi.bench.pressure.plan import Plan, Variant
from kvpsi.bench.pressure.watch import Sample, Watch
from kvpsi.bench.processes import must_have_been_killed
from kvpsi.board import Board, open_board
from kvpsi.hog import Hog, HogReport

_READING_S = 600.0  # by which the neighbour outlasts the generating, if the model does not end it before


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token: when it was there, how long it took, whether memory was given meanwhile."""

    time_s: float
    seconds: float
    gave: bool
    kv_cells: int


@dataclass(frozen=True, slots=True)
class Reading:
    """A prompt that was read: how long it took, and how often it was stopped to make room."""

    seconds: float
    interrupts: int


@dataclass(slots=True)
class Run:
    """What one variant did in one round.

    ``calm`` are the tokens before the neighbour began, ``pressed`` those beside it, ``alone`` those after it had left.
    ``done`` is what the model said at its end, None where it was killed.
    """

    variant: Variant
    round_number: int
    calm: list[Token] = field(default_factory=list)
    pressed: list[Token] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    pressure_from_s: float | None = None
    done: dict[str, Any] | None = None
    hog: HogReport | None = None
    kills: int = 0
    pressure_until_s: float | None = None
    reading_pressed: Reading | None = None
    reading_alone: Reading | None = None
    alone: list[Token] = field(default_factory=list)

    @property
    def model_killed(self) -> bool:
        """Whether the model did not get to its end."""
        return self.done is None

    @property
    def hog_killed(self) -> bool:
        """Whether the neighbour was killed."""
        return self.hog is not None and self.hog.killed_by is not None


def play(plan: Plan, conversation: Conversation, variant: Variant, round_number: int) -> Run:
    """Run it; a model or neighbour that is killed is a result.

    Raises:
        EnvironmentProblem: no board can be made here.
        KvpsiError: the model failed.
    """
    run = Run(variant, round_number)
    stretches = {"calm": run.calm, "tokens": run.pressed, "tokens_alone": run.alone}
    for file in (plan.model, conversation.state):
        forget_cached_pages(file)
    with open_board(plan.board) as board:
        model = board.start(
            _command(plan, conversation, variant, board.pressure_file()),
            group="model",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        watch = Watch(board, model.pid)
        watch.start()
        hog: Hog | None = None
        reports: list[HogReport] = []
        waiting: threading.Thread | None = None
        assert model.stdin is not None and model.stdout is not None
        # a model that is killed before it is answered breaks the pipe to it
        with contextlib.suppress(BrokenPipeError), model.stdin as answers, model.stdout as lines:
            for line in lines:
                what, value = said(line)
                if what in stretches:
                    stretches[what] += [Token(t, s, bool(gave), int(cells)) for t, s, gave, cells in value]
                elif what == "reading_pressed":
                    run.reading_pressed = Reading(**value)
                elif what == "reading_alone":
                    run.reading_alone = Reading(**value)
                elif what == "generated":
                    run.pressure_until_s = value
                elif what == "alone":
                    if hog is not None and waiting is not None:
                        hog.end()
                        waiting.join()
                    print(file=answers, flush=True)
                elif what == "done":
                    run.done = value
                elif what == "pressure":
                    run.pressure_from_s = value
                    if variant != "calm":
                        hog = _start_hog(plan, board, watch)
                        waiting = threading.Thread(target=lambda h: reports.append(h.wait()), args=(hog,))
                        waiting.start()
        if run.done is None:
            must_have_been_killed(model)
        model.wait()
        watch.stop()
        if hog is not None and waiting is not None:
            hog.end()
            waiting.join()
            run.hog = reports[0]
        figures = board.figures()
        run.samples, run.kills = watch.samples, figures.kills
    return run


def _command(plan: Plan, conversation: Conversation, variant: Variant, pressure_file: Path) -> list[str]:
    settings = {
        "n_threads": plan.n_threads,
        "calm_tokens": plan.calm_tokens,
        "n_predict": plan.n_predict,
        "read_tokens": plan.read_tokens,
        "keep": plan.keep,
        "tail": plan.tail,
        "min_prune": plan.min_prune,
        "prune_threshold": plan.prune_threshold,
        "pressure_file": str(pressure_file),
        "limit_s": plan.limit_s,
    }
    told = conversation.as_argument(plan.model)
    return [sys.executable, "-m", "kvpsi.bench.pressure.subject", variant, told, json.dumps(settings)]


def _start_hog(plan: Plan, board: Board, watch: Watch) -> Hog:
    def start(command: object) -> subprocess.Popen[str]:
        process = board.start(command, group="hog", stdout=subprocess.PIPE)  # type: ignore[arg-type]
        watch.hog_pid = process.pid
        return process

    return Hog(replace(plan.hog, hold_s=plan.limit_s + _READING_S), start)
