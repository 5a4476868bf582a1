"""Plays one scenario once: a fresh board, a vLLM with clients, and a neighbour until it is done or dead."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal, get_args

from kvpsi.bench.client import attempt, load, said_by
from kvpsi.bench.oom.scenarios import Scenario
from kvpsi.bench.prompts import draw
from kvpsi.bench.vllm.calm import N_PREDICT
from kvpsi.bench.vllm.server import GOVERNED, Server, Setting, serving
from kvpsi.board import Board, BoardSettings, open_board
from kvpsi.errors import EnvironmentProblem
from kvpsi.hog import Hog, HogReport, HogSettings
from kvpsi.units import format_bytes

Variant = Literal["kvpsi", "stock"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
_FULL_PROMPTS = 96
_FULL_SENTENCES = 30
_LOOKS = 3
_TOO_MUCH = 0.1  # of the board
_FITS = 0.95
_PERIODS = 2
_HOLD_S = 10.0
_LONGER_S = 5.0


@dataclass(frozen=True, slots=True)
class Room:
    """What a neighbour may take on a board: beside a vLLM whose blocks hold nothing, with the files that it has in
    memory, and beside one that keeps all, without these, as the kernel drops them before it kills anybody."""

    memory_bytes: int
    beside_least_bytes: int
    beside_all_bytes: int

    @property
    def shares(self) -> tuple[float, float]:
        """Of the first, between which a neighbour lives beside the one, and cannot live beside the other."""
        too_much_bytes = max(0, self.beside_all_bytes) + _TOO_MUCH * self.memory_bytes
        return too_much_bytes / max(1, self.beside_least_bytes), _FITS


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of it.

    Attributes:
        answers: afterwards, vLLM answers a question.
        answered: requests during the scenario that got their answer.
        failed: requests that did not.
        before_bytes: what the blocks held before the neighbour came; 0 for stock, which does not say.
        returned_bytes: what was given back from then on; 0 for stock.
        room: what a neighbour may take.
    """

    scenario: Scenario
    variant: Variant
    hog: HogReport
    kills: int
    answers: bool
    answered: int
    failed: int
    peak_bytes: int
    stall_s: float
    before_bytes: int
    returned_bytes: int
    room: Room

    @property
    def survived(self) -> bool:
        """Whether vLLM and the neighbour are alive, and the neighbour had more than fits beside one that keeps all."""
        return self.answers and self.hog.completed and self.hog.peak_bytes > self.room.beside_all_bytes


@contextmanager
def on_a_board(setting: Setting, variant: Variant, memory_bytes: int, log: Path) -> Iterator[tuple[Board, Server]]:
    """A board with a server, that has just started; what it says goes to ``log``.

    Raises:
        EnvironmentProblem: no board can be made here, or the server did not come up.
    """
    with open_board(BoardSettings(memory_bytes)) as board:
        start = partial(board.start, group="model")
        own = GOVERNED if variant == "kvpsi" else {}
        starting = True
        try:
            with serving(setting, log, own, start) as server:
                starting = False
                yield board, server
        except EnvironmentProblem as problem:
            if starting and board.figures().kills:
                raise EnvironmentProblem(
                    f"vLLM does not fit on a board of {format_bytes(memory_bytes)}; give more with --memory."
                ) from problem
            raise


def patient(hog: HogSettings) -> HogSettings:
    """The same with more time to get to its size, that comes back, and stays for a while: as processors are short it
    may be kept from its size for once."""
    period_s = hog.period_s + _LONGER_S * (2 if hog.shape == "pulse" else 1)  # a pulse grows in half of it
    return replace(hog, period_s=period_s, hold_s=max(_HOLD_S, _PERIODS * period_s - hog.grown_s))


def play(scenario: Scenario, variant: Variant, setting: Setting, room: Room, n_clients: int, log: Path) -> Outcome:
    """Play it on a board as large as that on which the room was measured.

    Raises:
        EnvironmentProblem: no board can be made here, or the server did not come up, or not through what comes before
            the neighbour.
    """
    with on_a_board(setting, variant, room.memory_bytes, log) as (board, server):
        _fill(server, scenario.number, n_clients, _FULL_PROMPTS if scenario.full else n_clients)
        before = server.status() if variant == "kvpsi" else {}
        clients = _Clients(server, scenario.number, n_clients)
        try:
            hog = Hog(scenario.hog, lambda command: board.start(command, group="hog", stdout=subprocess.PIPE))
            fared = hog.wait(lambda _time_s, _size_bytes: hog.end() if clients.gave_up else None)
        finally:
            clients.end()
        answers = not attempt(server.url, [said_by("user", "Hello")], 8).problem
        after = before
        if variant == "kvpsi" and answers:
            try:
                after = server.status()
            except EnvironmentProblem:  # what governs is dead
                answers = False
        figures = board.figures()
    return Outcome(
        scenario,
        variant,
        fared,
        figures.kills,
        answers,
        clients.answered,
        clients.failed,
        figures.peak_bytes or 0,
        figures.stall_s or 0.0,
        before.get("committed_bytes", 0),
        after.get("returned_bytes", 0) - before.get("returned_bytes", 0),
        room,
    )


def measure_room(setting: Setting, memory_bytes: int, n_clients: int, log: Path) -> Room:
    """Start one that is governed, have it do what it will do, and look after it answered.

    Raises:
        EnvironmentProblem: as `play`.
    """
    with on_a_board(setting, "kvpsi", memory_bytes, log) as (board, server):
        _fill(server, 0, n_clients, _FULL_PROMPTS)
        without_blocks_bytes = []
        for seed in range(_LOOKS):
            load(server.url, draw(2 * n_clients, seed), n_clients, N_PREDICT)
            status = server.status()
            without_blocks_bytes.append((board.cgroups.usage_bytes() or 0) - status["committed_bytes"])
        beside_all_bytes = (
            memory_bytes - server.anonymous_bytes() - status["capacity_bytes"] + status["committed_bytes"]
        )
        return Room(memory_bytes, memory_bytes - max(without_blocks_bytes), beside_all_bytes)


def _fill(server: Server, seed: int, n_clients: int, n_prompts: int) -> None:
    """Long prompts, which stay as cached prefixes; and beside its blocks vLLM keeps what it needed for many at once."""
    load(server.url, draw(n_prompts, seed, _FULL_SENTENCES), n_clients, 1)


class _Clients:
    """Ask one question after the other, each client until the end, or until it gets no answer."""

    def __init__(self, server: Server, seed: int, n_clients: int) -> None:
        self.answered = self.failed = 0
        self._server, self._seed = server, seed
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(n_clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, client: int) -> None:
        for number in count():
            if self._ended.is_set():
                return
            (prompt,) = draw(1, hash((self._seed, client, number)))
            problem = attempt(self._server.url, [said_by("user", prompt)], N_PREDICT).problem
            with self._lock:
                self.answered += not problem
                self.failed += bool(problem)
            if problem:
                return

    @property
    def gave_up(self) -> bool:
        """Whether none of them gets answers any more."""
        return self.failed == len(self._threads)

    def end(self) -> None:
        """Wait for the answers that were begun."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
