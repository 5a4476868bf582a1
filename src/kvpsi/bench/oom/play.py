"""Plays one scenario once: a fresh board, the models, and the neighbour until it is done or dead."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvpsi.bench.conversation import Conversation, forget_cached_pages
from kvpsi.bench.lines import said
from kvpsi.bench.oom.scenarios import Scenario
from kvpsi.bench.processes import must_have_been_killed
from kvpsi.board import Board, BoardSettings, open_board
from kvpsi.errors import KvpsiError
from kvpsi.hog import Hog, HogReport
from kvpsi.units import format_bytes

Variant = Literal["fixed", "kvpsi"]
_END_S = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of it. ``done`` is what each model said at its end, None for one that was killed."""

    scenario: Scenario
    variant: Variant
    done: list[dict[str, Any] | None]
    hog: HogReport
    kills: int
    peak_bytes: int
    stall_s: float

    @property
    def models_killed(self) -> int:
        """Models that did not get to their end."""
        return sum(each is None for each in self.done)


class _Model:
    """The parent's end of a model's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def wait_until_ready(self) -> None:
        """Wait until it has loaded its conversation, or was killed, which is a result.

        Raises:
            KvpsiError: it ended by itself.
        """
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            must_have_been_killed(self._process)

    def end(self) -> dict[str, Any] | None:
        """Have it end, and what it says; None if it was killed.

        Raises:
            KvpsiError: it ended by itself, without having done its work.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        timer = threading.Timer(_END_S, self._process.kill)  # one that thrashes does not get there by itself
        timer.start()
        try:
            with self._process.stdout as lines:
                told = dict(map(said, lines))
            self._process.wait()
        finally:
            timer.cancel()
        if "done" not in told:
            must_have_been_killed(self._process)
        return told.get("done")


def start_models(
    board: Board, variant: Variant, model: Path, conversation: Conversation, count: int
) -> Iterator[_Model]:
    """Start them one after the other: each takes its whole cache when it starts, and a board has room for one."""
    for number in range(count):
        command = [sys.executable, "-m", "kvpsi.bench.oom.subject", variant, conversation.as_argument(model)]
        started = _Model(board.start(command, group=f"model-{number}", stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        started.wait_until_ready()
        yield started


def play(scenario: Scenario, variant: Variant, model: Path, conversation: Conversation, memory_bytes: int) -> Outcome:
    """Play it.

    Raises:
        EnvironmentProblem: no board can be made here.
    """
    for file in (model, conversation.state):
        forget_cached_pages(file)
    with open_board(BoardSettings(memory_bytes, scenario.swap)) as board:
        models = list(start_models(board, variant, model, conversation, scenario.n_models))
        hog = Hog(scenario.hog, lambda command: board.start(command, group="hog", stdout=subprocess.PIPE))
        fared = hog.wait()
        done = [each.end() for each in models]
        figures = board.figures()
    return Outcome(scenario, variant, done, fared, figures.kills, figures.peak_bytes or 0, figures.stall_s or 0.0)


def floor_bytes(model: Path, conversation: Conversation, memory_bytes: int, n_models: int) -> int:
    """What so many governed models take on a board while their caches are nearly empty, weights included.

    Raises:
        KvpsiError: they do not fit.
    """
    forget_cached_pages(model)
    with open_board(BoardSettings(memory_bytes)) as board:
        models = list(start_models(board, "kvpsi", model, conversation, n_models))
        usage_bytes = board.cgroups.usage_bytes() or 0
        if any(each.end() is None for each in models):
            raise KvpsiError(
                f"A board of {format_bytes(memory_bytes)} has no room for {n_models} models; raise --memory."
            )
    return usage_bytes
