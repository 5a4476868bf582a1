"""One answer from a governed model, as text that comes bit by bit and figures afterwards."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import llama_cpp

from kvpsi.engines.llama import GovernedLlama, Summary
from kvpsi.errors import PromptTooLongError, UsageError
from kvpsi.kv import Forgotten, GatedCache
from kvpsi.units import format_bytes

_MOST_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. ``n_predict`` is the most tokens to generate; temperature 0 takes the likeliest."""

    n_predict: int = 256
    temperature: float = 0.0
    seed: int = 0
    repeat_penalty: float = 1.1

    def __post_init__(self) -> None:
        if not 1 <= self.n_predict <= _MOST_TOKENS:
            raise UsageError(f"{self.n_predict} tokens to generate make no sense; give 1 to {_MOST_TOKENS} with -n.")
        if not 0.0 <= self.temperature <= 10.0:
            raise UsageError(f"A temperature of {self.temperature} makes no sense; give 0 to 10 with --temp.")
        if not 0.0 < self.repeat_penalty <= 10.0:
            raise UsageError(f"A repeat penalty of {self.repeat_penalty} makes no sense; 1 is none, 1.1 is usual.")


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one answer; ``tokens_per_second`` counts from the first token on, the prompt has its own.

    ``forgotten_tokens`` were taken from the model's context by evictions while it read and wrote.
    """

    prompt_tokens: int
    generated_tokens: int
    prompt_seconds: float
    generate_seconds: float
    cache: Summary | None
    forgotten_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Speed of generating, without the prompt."""
        return (self.generated_tokens - 1) / self.generate_seconds if self.generated_tokens > 1 else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of reading the prompt."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    def line(self) -> str:
        """The closing line for people."""
        speed = (
            f"{self.prompt_tokens} tokens read at {self.prompt_tokens_per_second:.0f} tok/s, "
            f"{self.generated_tokens} written"
        )
        if self.generated_tokens > 1:
            speed += f" at {self.tokens_per_second:.1f} tok/s"
        if self.cache is None:
            return f"{speed} · not governed"
        c = self.cache
        forgotten = f", {_count(self.forgotten_tokens, 'token')} forgotten" if self.forgotten_tokens else ""
        return (
            f"{speed} · KV resident {format_bytes(c.resident_bytes)} (peak {format_bytes(c.peak_resident_bytes)}, "
            f"full cache {format_bytes(c.capacity_bytes)}) · {_count(c.releases, 'release')}, "
            f"{format_bytes(c.returned_bytes)} returned · {_count(c.trims, 'trim')}{forgotten} · "
            f"stall {c.stall_s:.2f} s"
        )


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


class ForgottenTokens:
    """Counts the tokens that a cache forgets while it is entered; who was told of them before still is."""

    def __init__(self, cache: GatedCache) -> None:
        self.n_tokens = 0
        self._cache = cache
        self._next: Callable[[Forgotten], None] | None = None

    def __enter__(self) -> ForgottenTokens:
        self._next = self._cache.on_forgotten
        self._cache.on_forgotten = self._count
        return self

    def __exit__(self, *_: object) -> None:
        self._cache.on_forgotten = self._next

    def _count(self, lost: Forgotten) -> None:
        self.n_tokens += lost.n_tokens
        if self._next is not None:
            self._next(lost)


class Answer:
    """Iterate over it for the pieces of text; afterwards `report` has the figures."""

    def __init__(self, llm: llama_cpp.Llama, governed: GovernedLlama | None, prompt: str, sampling: Sampling) -> None:
        self._llm = llm
        self._governed = governed
        self._prompt = prompt
        self._sampling = sampling
        self.report: Report | None = None

    def __iter__(self) -> Iterator[str]:
        s = self._sampling
        started = first = time.perf_counter()
        generated = 0
        held_before = 0
        forgotten = ForgottenTokens(self._governed.cache) if self._governed else None
        try:
            with forgotten or contextlib.nullcontext():
                for piece in self._pieces(s):
                    if not generated:
                        first = time.perf_counter()
                        held_before = self._llm.n_tokens
                    generated = self._llm.n_tokens - held_before + 1
                    yield piece
        finally:
            ended = time.perf_counter()
            summary = self._governed.summary() if self._governed else None
            n_forgotten = forgotten.n_tokens if forgotten else 0
            self.report = Report(held_before, generated, first - started, ended - first, summary, n_forgotten)

    def _pieces(self, s: Sampling) -> Iterator[str]:
        try:
            chunks: Any = self._llm.create_chat_completion(
                [{"role": "user", "content": self._prompt}],
                max_tokens=s.n_predict,
                temperature=s.temperature,
                seed=s.seed,
                repeat_penalty=s.repeat_penalty,
                stream=True,
            )
            for chunk in chunks:
                text = chunk["choices"][0]["delta"].get("content")
                if text:
                    yield text
        except ValueError as error:
            if "exceed context window" in str(error):
                raise PromptTooLongError(f"The prompt does not fit: {error}; shorten it or raise -c.") from error
            raise
