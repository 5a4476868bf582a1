"""The model that forgets: reads, saves what it read, and says how likely it finds what comes next."""

from __future__ import annotations

import contextlib
import mmap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvpsi.engines.loading import LoadSettings
from kvpsi.errors import EnvironmentProblem
from kvpsi.kv import CacheSettings, ElasticCache
from kvpsi.kv.policies import POLICIES, Auto
from kvpsi.kv.questions import Question
from kvpsi.serving.batch import Batch
from kvpsi.serving.context import ContextPlan, ServedContext, open_context
from kvpsi.serving.sampling import log_probabilities, logits_of

_SEQUENCE = 0
_SCORE_A_STEP_S = 0.004


@dataclass(frozen=True, slots=True)
class Held:
    """What a model has read: its tokens, its cache's state, and the question that was pending."""

    tokens: tuple[int, ...]
    state: mmap.mmap
    question: Question | None


class Subject:
    """One model with one sequence. ``scorings`` has the seconds of each scoring, and of its longest step."""

    def __init__(self, context: ServedContext) -> None:
        self._context = context
        assert isinstance(context.cache, ElasticCache)
        self._cache: ElasticCache = context.cache
        self._batch = Batch(context.n_batch)
        self._tokens: list[int] = []
        self.scorings: list[tuple[float, float]] = []

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, with the names of control tokens understood."""
        return [int(t) for t in self._context.model.tokenize(text.encode(), False, True)]

    def clear(self) -> None:
        """Read nothing yet."""
        self._cache.policy = Auto()  # the questions are read for all
        self._cache.clear()
        self._tokens = []

    def read(self, tokens: Sequence[int]) -> None:
        """Go on reading; the end of it is the end of a prompt."""
        for at in range(0, len(tokens), self._context.n_batch):
            some = tokens[at : at + self._context.n_batch]
            self._decode(some, output=at + len(some) == len(tokens))

    def save(self) -> Held:
        """What was read so far."""
        questions = self._cache.questions
        question = questions.of(_SEQUENCE) if questions is not None else None
        return Held(tuple(self._tokens), self._cache.save_sequence(_SEQUENCE), question)

    def load(self, held: Held) -> None:
        """Have read that."""
        self._cache.policy = Auto()
        self._cache.clear()
        if not self._cache.load_sequence(held.state, _SEQUENCE):
            raise EnvironmentProblem("llama.cpp would not take a saved conversation back.")
        self._cache.note_tokens(_SEQUENCE, held.tokens)
        if self._cache.questions is not None and held.question is not None:
            self._cache.questions.resume(_SEQUENCE, held.question)
        self._tokens = list(held.tokens)

    def forget(self, policy: str, kept: float) -> float:
        """Keep that share of what was read; which share of the forgotten bytes lay in whole pages and went back."""
        self._cache.policy = POLICIES[policy]()
        self._score()
        trim = self._cache.evict(len(self._tokens) - int(kept * len(self._tokens)))
        freed_bytes = trim.freed_cells * self._cache.bytes_per_cell
        return trim.release.returned_bytes / freed_bytes if freed_bytes else 1.0

    def _score(self) -> None:
        """Have what the question attends to be known, as it is when memory gets short bit by bit."""
        steps: list[float] = []
        complete = self._cache.questions is None or not self._cache.policy.heeds_questions
        while not complete:
            began = time.perf_counter()
            complete = self._cache.score_questions(_SCORE_A_STEP_S)
            steps.append(time.perf_counter() - began)
        if len(steps) > 1:
            self.scorings.append((sum(steps), max(steps)))

    def losses(self, tokens: Sequence[int], n_last: int) -> list[float]:
        """Minus the natural logarithm of the probability of each of the last tokens, as they come."""
        first = len(tokens) - n_last
        if first < 1:
            raise EnvironmentProblem("A loss needs a token before it.")
        found: list[float] = []
        self._batch.clear()
        self._batch.add(_SEQUENCE, len(self._tokens), tokens[:-1], output=True)
        self._batch.want_all()
        self._run()
        for index in range(first - 1, len(tokens) - 1):
            chances = log_probabilities(logits_of(self._context.ctx, index, self._context.n_vocab))
            found.append(-float(chances[tokens[index + 1]]))
        self._tokens += tokens[:-1]
        return found

    def _decode(self, tokens: Sequence[int], *, output: bool) -> None:
        self._batch.clear()
        self._batch.add(_SEQUENCE, len(self._tokens), tokens, output=output)
        self._run()
        self._tokens += tokens

    def _run(self) -> None:
        code = self._cache.decode(self._batch.native)
        if code:
            raise EnvironmentProblem(f"llama_decode returned {code}.")


def perplexity(losses: Sequence[float]) -> float:
    """The exponential of the mean loss."""
    return float(np.exp(np.mean(losses)))


@contextlib.contextmanager
def open_subject(model: Path, n_ctx: int, n_threads: int, settings: CacheSettings) -> Iterator[Subject]:
    """A model with a context of so many tokens."""
    plan = ContextPlan(LoadSettings(n_ctx, n_threads), n_seq=1, settings=settings, policy=Auto())
    with open_context(model, plan, n_ctx) as context:
        if not isinstance(context.cache, ElasticCache):
            raise EnvironmentProblem("This model's cache cannot forget in place, so there is nothing to compare.")
        yield Subject(context)
