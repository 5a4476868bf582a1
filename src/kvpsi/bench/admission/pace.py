"""Whether answers that are being written keep their pace while others come, one of them with a long prompt."""

from __future__ import annotations

import bisect
import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvpsi.bench.admission.plan import Plan, Scenario
from kvpsi.bench.admission.server import Subject
from kvpsi.bench.client import attempt, said_by
from kvpsi.bench.prompts import TOKENS_OF_A_SENTENCE, draw

_ALONE_S = 12.0
_FIRST_S = 0.3
_LOOK_S = 1.0
_LIMIT_S = 240.0
_NEWCOMERS = 8
_LONG_TOKENS = 2000
_STREAM_TOKENS = 2500


@dataclass(frozen=True, slots=True)
class Pace:
    """Gaps between two tokens of the streams, in seconds, while others come, and of the same tokens without others.

    ``long_first_token_s`` is how long the client with the long prompt waited for its first token, None if it had none;
    ``newcomers_s`` are the first tokens of the others that had one meanwhile. ``at_once`` is how many answers were
    begun, once a second.
    """

    variant: str
    scenario: Scenario
    calm_s: tuple[float, ...]
    pressed_s: tuple[float, ...]
    long_first_token_s: float | None
    at_once: tuple[int, ...]
    newcomers_s: tuple[float, ...]
    problems: tuple[str, ...]


class _Asked:
    """Clients with one question each, until they are answered or not wanted any more."""

    def __init__(self, url: str, prompts: Sequence[str], n_predict: int, *, endless: bool = False) -> None:
        self.times: list[list[float]] = [[] for _ in prompts]
        self.problems: list[str] = []
        self._ended = threading.Event()
        self._began = time.monotonic()
        self._threads = [
            threading.Thread(target=self._ask, args=(url, prompt, n_predict, endless, times), daemon=True)
            for prompt, times in zip(prompts, self.times, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, url: str, prompt: str, n_predict: int, endless: bool, times: list[float]) -> None:
        messages = [said_by("user", prompt)]
        made = attempt(
            url,
            messages,
            n_predict,
            timeout_s=2 * _LIMIT_S,
            ended=self._ended,
            on_text=times.append,
            ignore_eos=endless,
        )
        if made.problem and not self._ended.is_set():
            self.problems.append(made.problem)

    @property
    def is_alive(self) -> bool:
        """Whether all are still waiting for more."""
        return all(thread.is_alive() for thread in self._threads)

    def first_tokens_s(self) -> list[float]:
        """Seconds until the first token, of those that had one."""
        return [times[0] - self._began for times in self.times if times]

    def end(self) -> None:
        """Go away."""
        self._ended.set()
        for thread in self._threads:
            thread.join()


def play(plan: Plan, subject: Subject, seed: int) -> Pace:
    """Streams; after a while a prompt of 2,000 tokens and eight requests come, until the first has been read. Then as
    many streams alone, to compare the same tokens with: they take longer the more there are before them."""
    long = draw(1, seed + 1, _LONG_TOKENS // TOKENS_OF_A_SENTENCE)
    at_once: list[int] = []
    with subject.pressed():
        streams = _Asked(subject.url, draw(plan.streams, seed), _STREAM_TOKENS, endless=True)
        time.sleep(_ALONE_S)
        came_s = time.monotonic()
        reader = _Asked(subject.url, long, 1)
        time.sleep(_FIRST_S)  # it is the first of them, so that it is read while the streams are there
        others = _Asked(subject.url, draw(_NEWCOMERS, seed + 2), plan.n_predict)
        while reader.is_alive and streams.is_alive and time.monotonic() < came_s + _LIMIT_S:
            time.sleep(_LOOK_S)
            at_once.append(subject.status()["running"])
        over_s = time.monotonic()
        for each in (others, reader, streams):
            each.end()
        spans = [(bisect.bisect_left(times, came_s), bisect.bisect_right(times, over_s)) for times in streams.times]
        alone = _Asked(subject.url, draw(plan.streams, seed + 3), _STREAM_TOKENS, endless=True)
        most = max(end for _, end in spans)
        while alone.is_alive and min(map(len, alone.times)) < most and time.monotonic() < over_s + 2 * _LIMIT_S:
            time.sleep(_LOOK_S)
        alone.end()
    first = reader.first_tokens_s()
    return Pace(
        subject.variant,
        subject.scenario,
        _gaps(alone.times, spans),
        _gaps(streams.times, spans),
        first[0] if first else None,
        tuple(at_once),
        tuple(others.first_tokens_s()),
        (*streams.problems, *reader.problems, *alone.problems),
    )


def _gaps(streams: Sequence[Sequence[float]], spans: Sequence[tuple[int, int]]) -> tuple[float, ...]:
    """Between the tokens of these spans."""
    return tuple(
        b - a
        for times, (start, end) in zip(streams, spans, strict=True)
        for a, b in itertools.pairwise(times[max(0, start - 1) : end])
    )
