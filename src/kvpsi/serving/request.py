"""What is asked of the engine, and what it says while it answers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from kvpsi.admission.queue import USUAL_URGENCY
from kvpsi.errors import KvpsiError
from kvpsi.serving.sampling import SamplingSettings

FinishReason = Literal["stop", "length"]
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class TokenChance:
    """A token and how likely it was: ``logprob`` is the natural logarithm, before any sampler."""

    token: int
    piece: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token that was generated, and the likeliest ones in its place, likeliest first."""

    chance: TokenChance
    top: tuple[TokenChance, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """More of the answer: ``text`` that can be shown, and its tokens if their probabilities were asked for."""

    text: str
    tokens: tuple[Chosen, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer. ``cached_tokens`` of the prompt did not have to be read again; it waited ``queued_s``."""

    reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    forgotten_tokens: int
    queued_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of one that could not be answered."""

    error: KvpsiError


Event: TypeAlias = Text | Finished | Failed


@dataclass(eq=False, slots=True)
class Request:
    """One answer to be generated.

    Attributes:
        prompt: its tokens, at least one.
        listener: told of every event; see `kvpsi.serving.engine.Engine` for the thread that does so.
        sampling: how tokens are chosen.
        max_tokens: the most to generate.
        stop: strings at which the answer ends.
        top_logprobs: how many likely tokens to tell in place of each, None: no probabilities at all.
        ignore_eos: whether to go on after the model has ended its answer.
        pin: a name for the conversation, so that it is kept longer.
        urgency: 0 to 7, 0 the most urgent.
        flow: whose it is, for fairness between those who are as urgent.
        begin_by_s: CLOCK_MONOTONIC time after which it is not begun any more.
        wanted_by_s: the same of its end: it is turned away if that cannot be.
    """

    prompt: Sequence[int]
    listener: Callable[[Event], None]
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    ignore_eos: bool = False
    pin: str | None = None
    urgency: int = USUAL_URGENCY
    flow: str = ""
    begin_by_s: float = float("inf")
    wanted_by_s: float = float("inf")
    number: int = field(default_factory=lambda: next(_numbers))
    arrived_s: float = field(default_factory=time.monotonic)
    cancelled: bool = False

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt)

    @property
    def fingerprint(self) -> Hashable:
        """The same when the same client asks the same again."""
        return self.flow, tuple(self.prompt), self.max_tokens, self.stop
