"""A fleet: its boards, what else takes memory on them, and what is asked of all of them together."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from kvpsi.errors import UsageError
from kvpsi.governor.adapt import AdaptSettings
from kvpsi.governor.law import LawSettings
from kvpsi.hog import HogSettings
from kvpsi.sim import neighbours
from kvpsi.sim.boards import MIB, Board
from kvpsi.sim.conversation import Talk
from kvpsi.sim.llms import Llm, Speed
from kvpsi.sim.planning import safe_tokens

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

MOST_BOARDS = 1_000_000
LONGEST_S = 3600.0
MOST_ANSWER_TOKENS = 1024
"""What every request states as the most of its answer: nobody knows before how long it gets."""
GIVE_UP_S = 600.0
"""After so long a client ends the connection, as OpenAI's own does."""

End = Literal["answered", "refused", "failed"]


@dataclass(eq=False, slots=True)
class Request:
    """One question, of a conversation of its own, so that no board has read any of it before.

    Attributes:
        number: of all of them, in order.
        asked_s: when it came to the router.
        n_prompt, n_answer: tokens.
        max_tokens: the most of its answer, which is what others know of it.
        arrived_s: when it came to the board that it is at.
        begin_by_s: after that it is not begun there any more.
        board: where it is, or was last; -1 before.
        tries: boards that it was sent to.
        written: tokens of its answer, a fraction of the next one included.
        first_s, ended_s: when the first token was there, and the last; None before.
        end: how it ended.
    """

    number: int
    asked_s: float
    n_prompt: int
    n_answer: int
    max_tokens: int = MOST_ANSWER_TOKENS
    urgency: int = 3
    flow: str = ""
    arrived_s: float = 0.0
    begin_by_s: float = 0.0
    board: int = -1
    tries: int = 0
    written: float = 0.0
    first_s: float | None = None
    ended_s: float | None = None
    end: End | None = None

    wanted_by_s = float("inf")

    @property
    def fingerprint(self) -> int:
        """The same when the same client asks the same again."""
        return self.number


@dataclass(frozen=True, slots=True)
class Traces:
    """What all neighbours of all boards want, in order of time: neighbour ``neighbour[i]`` of board ``board[i]`` wants
    ``size_bytes[i]`` from ``time_s[i]`` on; shape [points] each."""

    time_s: Floats
    board: Ints
    neighbour: Ints
    size_bytes: Floats


@dataclass(frozen=True, slots=True)
class Fleet:
    """What is the same for all routers; each seed draws its own neighbours and requests of it.

    Attributes:
        n_boards: all alike, but for their neighbours.
        board, llm, n_ctx: of each.
        neighbours: kinds and the most that each takes, in bytes; on each board it is drawn between nothing and that.
        talk: lengths of prompts (``first_tokens``) and answers, on average.
        load: requests that come, as a share of what all boards could answer (`capacity`).
        seconds: in which they come; it goes on until all have ended.
        parallel, most_waiting, queue_timeout_s: of each server, see `kvpsi serve`.
        poll_s: how often the router asks each board how it is.
        law: constants of kvpsi's law.
        adapt: bounds within which they follow what each board shows; None: they stay as they are.
    """

    n_boards: int
    board: Board
    llm: Llm
    n_ctx: int
    neighbours: tuple[tuple[str, int], ...] = ()
    talk: Talk = field(default_factory=Talk)
    load: float = 0.7
    seconds: float = 120.0
    parallel: int = 8
    most_waiting: int = 64
    queue_timeout_s: float = 60.0
    poll_s: float = 1.0
    law: LawSettings = field(default_factory=LawSettings)
    adapt: AdaptSettings | None = None

    def __post_init__(self) -> None:
        if unknown := [kind for kind, _ in self.neighbours if kind not in neighbours.KINDS]:
            raise UsageError(f"Neighbours of a fleet are {', '.join(neighbours.KINDS)}, not {', '.join(unknown)}.")
        if not 2 <= self.n_boards <= MOST_BOARDS:
            raise UsageError(f"--fleet {self.n_boards} makes no sense; give 2 to {MOST_BOARDS} boards.")
        if self.n_ctx < 2 or self.parallel < 1 or self.most_waiting < 0:
            raise UsageError("A board of a fleet has a context of two tokens at least, and a place for one answer.")
        if not 0 < self.load <= 10:
            raise UsageError(f"--load {self.load:g} makes no sense; give more than 0 and up to 10, 1 is what they can.")
        if not 0 < self.seconds <= LONGEST_S:
            raise UsageError(f"--seconds {self.seconds:g} makes no sense for a fleet; give up to {LONGEST_S:.0f}.")
        if not 0.1 <= self.poll_s <= LONGEST_S or self.queue_timeout_s <= 0:
            raise UsageError(f"--poll-s {self.poll_s:g} makes no sense; give 0.1 to {LONGEST_S:.0f} seconds.")

    @property
    def speed(self) -> Speed:
        """Of the model on these boards."""
        return Speed.on(self.board, self.llm)

    @property
    def capacity(self) -> float:
        """Requests a second that all boards could answer if nobody else were there and all their places were taken, as
        far as the context has room for so many: the time of one is that of its prompt and its share of the steps."""
        talk, speed = self.talk, self.speed
        n_prompt, n_answer = min(talk.first_tokens, self.n_ctx), min(talk.answer_tokens, MOST_ANSWER_TOKENS)
        at_once = max(1.0, min(self.parallel, self.n_ctx / (n_prompt + n_answer)))
        used_bytes = int(at_once * (n_prompt + n_answer / 2) * self.llm.bytes_per_token)
        read_s = speed.chunk_s(n_prompt, used_bytes)
        step_s = speed.token_s(used_bytes) + (at_once - 1) * speed.read_s
        return self.n_boards / (read_s + n_answer * step_s / at_once)

    def safe_ctx(self) -> int:
        """Tokens of a static cache for which there is always room; 0 if there is none."""
        return safe_tokens(self.board, self.llm, self.n_ctx, sum(size for _, size in self.neighbours))

    def requests(self, seed: int) -> list[Request]:
        """In order of time: a Poisson process; lengths are exponential around their means, as far as they fit."""
        rng = random.Random(f"requests {seed}")
        requests: list[Request] = []
        at_s = rng.expovariate(self.load * self.capacity)
        while at_s < self.seconds:
            n_answer = min(MOST_ANSWER_TOKENS, self.n_ctx - 1, 1 + int(rng.expovariate(1 / self.talk.answer_tokens)))
            n_prompt = min(self.n_ctx - n_answer, 1 + int(rng.expovariate(1 / self.talk.first_tokens)))
            requests.append(Request(len(requests), at_s, n_prompt, n_answer))
            at_s += rng.expovariate(self.load * self.capacity)
        return requests

    def neighbours_of(self, board: int, seed: int, until_s: float) -> list[HogSettings]:
        """Those of one board."""
        drawn_by = seed * MOST_BOARDS + board
        rng = random.Random(f"sizes {drawn_by}")
        return [
            neighbours.draw(kind, max(MIB, int(rng.random() * most_bytes)), until_s, 100 * drawn_by + number)
            for number, (kind, most_bytes) in enumerate(self.neighbours)
        ]

    def traces(self, seed: int, until_s: float) -> Traces:
        """What the neighbours want until then; after that each wants what it wanted last."""
        times: list[float] = []
        boards: list[int] = []
        numbers: list[int] = []
        sizes: list[float] = []
        for board in range(self.n_boards):
            for number, drawn in enumerate(self.neighbours_of(board, seed, until_s)):
                times += [at_s for at_s, _ in drawn.trace]
                sizes += [float(wanted_bytes) for _, wanted_bytes in drawn.trace]
                boards += [board] * len(drawn.trace)
                numbers += [number] * len(drawn.trace)
        order = np.argsort(np.array(times), kind="stable")
        return Traces(
            np.array(times)[order],
            np.array(boards, dtype=np.int64)[order],
            np.array(numbers, dtype=np.int64)[order],
            np.array(sizes)[order],
        )
