"""How throughput follows when neighbours come and go."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvpsi.bench.admission.server import Subject
from kvpsi.bench.client import attempt, said_by
from kvpsi.bench.prompts import draw

_CLIENTS = 8
_WARM_UP_S, _CALM_S, _BUSY_S, _AFTER_S = 4.0, 20.0, 12.0, 25.0
_COMES_AFTER_S, _GOES_AFTER_S = 2.0, 5.0


@dataclass(frozen=True, slots=True)
class Adaptation:
    """Tokens a second before neighbours came, from two seconds after that, and from five seconds after they had gone.

    ``token_s`` is when each token came, in seconds; ``came_s`` and ``went_s`` tell when the neighbours did, and
    ``calm_changes`` how often the number of threads had changed before.
    """

    variant: str
    round: int
    calm: float
    busy: float
    after: float
    came_s: float
    went_s: float
    calm_changes: int
    token_s: tuple[float, ...]

    def each_second(self) -> list[int]:
        """How many tokens came in each second."""
        counts = [0] * (int(max(self.token_s, default=0.0)) + 1)
        for at_s in self.token_s:
            counts[int(at_s)] += 1
        return counts


def play(subject: Subject, number: int, seed: int, n_predict: int) -> Adaptation:
    """Eight clients all the time, who want answers of half to twice ``n_predict`` tokens, so that they do not all begin
    at the same moments; neighbours on every processor come, and go again. Prompts are short, as tokens that are read do
    not count, and how many of them fall into a window is chance."""
    ended = threading.Event()
    times: list[float] = []

    def client(asked: Sequence[tuple[str, int]]) -> None:
        for prompt, n_tokens in asked:
            if ended.is_set():
                return
            messages = [said_by("user", prompt)]
            attempt(subject.url, messages, n_tokens, timeout_s=60, ended=ended, on_text=times.append, ignore_eos=True)

    rng = random.Random(seed)
    asked = [(prompt, rng.randint(n_predict // 2, 2 * n_predict)) for prompt in draw(_CLIENTS * 200, seed, 1)]
    began = time.monotonic()
    threads = [threading.Thread(target=client, args=(asked[i::_CLIENTS],), daemon=True) for i in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(_WARM_UP_S + _CALM_S)
    calm_changes = subject.status()["thread_changes"]
    came_s = time.monotonic()
    subject.neighbours.come(os.cpu_count() or 1)
    try:
        time.sleep(_BUSY_S)
    finally:
        subject.neighbours.go()
    went_s = time.monotonic()
    time.sleep(_AFTER_S)
    over_s = time.monotonic()
    ended.set()
    for thread in threads:
        thread.join(90)

    def speed(from_s: float, to_s: float) -> float:
        return sum(from_s <= at_s < to_s for at_s in times) / (to_s - from_s)

    return Adaptation(
        subject.variant,
        number,
        speed(came_s - _CALM_S, came_s),
        speed(came_s + _COMES_AFTER_S, went_s),
        speed(went_s + _GOES_AFTER_S, over_s),
        came_s - began,
        went_s - began,
        calm_changes,
        tuple(sorted(at_s - began for at_s in times)),
    )
