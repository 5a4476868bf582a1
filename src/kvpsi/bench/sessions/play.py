"""One server on a board of its own: conversations that come back, many that do not, and a neighbour that grows."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from kvpsi.bench.client import Asked, Message, ask, said_by
from kvpsi.bench.prompts import TOKENS_OF_A_SENTENCE, draw
from kvpsi.bench.servers import Name, Running, Setting, running
from kvpsi.board import Board, BoardSettings, open_board
from kvpsi.errors import EnvironmentProblem, UsageError
from kvpsi.hog import Hog, HogReport, HogSettings
from kvpsi.units import format_bytes

Tell = Callable[[str], None]
Note = Callable[[str, int, int], None]
"""Takes what was going on, which request it was, and the server's resident set in bytes."""
_QUESTIONS = ("And what happens after that?", "Who is the most important of them?")
_ANSWER_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """What every server goes through.

    Attributes:
        model: the GGUF file.
        servers: whom to compare; those that are not installed are left out.
        conversations: that come back.
        history_tokens: about as many tokens has the first turn of each.
        requests: of conversations that do not come back.
        request_tokens: about as many tokens has each of these.
        memory_bytes: of the board.
        hog: the neighbour that grows when all requests were answered.
        n_ctx: tokens of context in all.
        n_threads: of each server; 0: as many as can run.
        seed: of the texts.
        spill_max: how much of kvpsi's conversations may be parked in files, as for `kvpsi serve`.
    """

    model: Path
    servers: tuple[Name, ...] = ("kvpsi", "xllamacpp")
    conversations: int = 5
    history_tokens: int = 2000
    requests: int = 200
    request_tokens: int = 200
    memory_bytes: int = 2 << 30
    hog: HogSettings = field(default_factory=lambda: HogSettings(1600 << 20, rate_bytes_s=200 << 20, hold_s=5.0))
    n_ctx: int = 16384
    n_threads: int = 0
    seed: int = 1
    spill_max: str = "4G"

    def __post_init__(self) -> None:
        if not self.servers or min(self.conversations, self.requests) < 1:
            raise UsageError("There has to be a server, a conversation and a request at least.")
        if not 0 < self.history_tokens <= self.n_ctx // 2 or not 0 < self.request_tokens <= self.n_ctx // 2:
            raise UsageError("A conversation has one token at least, and at most half as many as the context.")
        if self.hog.size_bytes >= self.memory_bytes:
            raise UsageError("The neighbour is as large as the board: lower --pressure-mib, or raise --memory.")


@dataclass(slots=True)
class Played:
    """What one server did.

    Attributes:
        server: which.
        first_s, second_s, returned_s: for each conversation the time to the first token of its first turn, of the
            second right after it, and of a third after all others were answered in between.
        first_answers, first_again: to the first turn, and to the same one when the neighbour is gone. Both times it is
            read in whole, unless a server still has it.
        answers, answers_again: the same of the third turn. What the model wrote itself is read in one go the second
            time, which llama.cpp rounds in another way than token by token.
        cached_again: tokens of the first turns that did not have to be read again.
        begun_bytes, full_bytes, beside_bytes: resident set at the beginning, after all requests, and the least of it
            beside the neighbour.
        capacity_bytes: what kvpsi's cache can be at most; 0 for others.
        answered: requests that were answered.
        kills: processes that the kernel killed on the board.
        hog: how the neighbour fared; None if the server did not live until then.
    """

    server: Name
    first_s: list[float] = field(default_factory=list)
    second_s: list[float] = field(default_factory=list)
    returned_s: list[float] = field(default_factory=list)
    first_answers: list[str] = field(default_factory=list)
    first_again: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    answers_again: list[str] = field(default_factory=list)
    cached_again: int = 0
    begun_bytes: int = 0
    full_bytes: int = 0
    beside_bytes: int = 0
    capacity_bytes: int = 0
    answered: int = 0
    kills: int = 0
    hog: HogReport | None = None


def play(plan: Plan, played: Played, setting: Setting, note: Note, tell: Tell) -> None:
    """Have one server go through all of it, or until the kernel kills it, which is a result.

    Args:
        played: takes what it did, as it does it.

    Raises:
        EnvironmentProblem: it failed without having been killed, or does not fit on the board.
    """
    with open_board(BoardSettings(plan.memory_bytes)) as board:

        def start(command: Sequence[str]) -> subprocess.Popen[str]:
            return board.start(command, group="server", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        try:
            with running(played.server, setting, start) as server:
                _Run(plan, server, played, note, tell).through(board)
        except (EnvironmentProblem, OSError, psutil.Error) as error:
            if not played.begun_bytes:
                raise EnvironmentProblem(
                    f"{played.server} did not come up on a board of {format_bytes(plan.memory_bytes)}; raise --memory, "
                    "or start it by hand to see why."
                ) from error
            if not board.cgroups.kills("server"):
                raise
        finally:
            played.kills = board.figures().kills


class _Run:
    """The steps, in their order."""

    def __init__(self, plan: Plan, server: Running, played: Played, note: Note, tell: Tell) -> None:
        self._plan = plan
        self._server = server
        self._played = played
        self._note = note
        self._tell = tell
        self._talks: list[list[Message]] = []

    def through(self, board: Board) -> None:
        """All of them."""
        name, played = self._server.name, self._played
        played.begun_bytes = self._server.rss_bytes
        played.capacity_bytes = self._server.capacity_bytes()
        self._tell(f"conversations that come back, {name}")
        self._converse()
        played.answers = self._return(played.returned_s)
        self._tell(f"{self._plan.requests} others, {name}")
        self._ask_others()
        played.full_bytes = self._server.rss_bytes
        self._tell(f"beside a neighbour, {name}")
        self._grow_a_neighbour(board)
        self._tell(f"the conversations again, {name}")
        again = [self._ask(talk[:1]) for talk in self._talks]
        played.first_again = [a.text for a in again]
        played.cached_again = sum(a.n_cached for a in again)
        played.answers_again = self._return([])

    def _ask(self, messages: Sequence[Message]) -> Asked:
        return ask(self._server.url, messages, _ANSWER_TOKENS)

    def _converse(self) -> None:
        plan, played = self._plan, self._played
        n_sentences = max(1, plan.history_tokens // TOKENS_OF_A_SENTENCE)
        for number, text in enumerate(draw(plan.conversations, plan.seed, n_sentences)):
            talk = [said_by("user", text)]
            first = self._ask(talk)
            talk += [said_by("assistant", first.text), said_by("user", _QUESTIONS[0])]
            second = self._ask(talk)
            talk += [said_by("assistant", second.text), said_by("user", _QUESTIONS[1])]
            played.first_s.append(first.first_token_s)
            played.first_answers.append(first.text)
            played.second_s.append(second.first_token_s)
            self._talks.append(talk)
            self._note("conversation", number, self._server.rss_bytes)

    def _return(self, first_token_s: list[float]) -> list[str]:
        """The third turn of each conversation; what was answered."""
        asked = [self._ask(talk) for talk in self._talks]
        first_token_s += [a.first_token_s for a in asked]
        return [a.text for a in asked]

    def _ask_others(self) -> None:
        plan, played = self._plan, self._played
        n_sentences = max(1, plan.request_tokens // TOKENS_OF_A_SENTENCE)
        for number, text in enumerate(draw(plan.requests, plan.seed + 1, n_sentences)):
            self._ask([said_by("user", text)])
            played.answered += 1
            self._note("request", number, self._server.rss_bytes)

    def _grow_a_neighbour(self, board: Board) -> None:
        played = self._played
        hog = Hog(self._plan.hog, lambda command: board.start(command, group="hog", stdout=subprocess.PIPE))
        seen: list[int] = []
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.2):
                try:
                    rss_bytes = self._server.rss_bytes
                except psutil.Error:
                    return
                if not rss_bytes:  # it was killed
                    return
                seen.append(rss_bytes)
                self._note("neighbour", len(seen), rss_bytes)

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            played.hog = hog.wait()
        finally:
            over.set()
            watcher.join()
        played.beside_bytes = min(seen, default=0) if self._server.is_alive else 0
