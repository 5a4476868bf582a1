"""How throughput follows when neighbours come and go."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

from kvpsi.bench.admission.server import Subject
from kvpsi.bench.client import attempt, said_by
from kvpsi.bench.prompts import draw

_CLIENTS = 8
_WARM_UP_S, _CALM_S, _BUSY_S, _AFTER_S = 3.0, 10.0, 12.0, 15.0
_COMES_AFTER_S, _GOES_AFTER_S = 2.0, 5.0


@dataclass(frozen=True, slots=True)
class Adaptation:
    """Tokens a second before neighbours came, from two seconds after that, and from five seconds after they had gone.

    ``token_s`` is when each token came, in seconds; ``came_s`` and ``went_s`` tell when the neighbours did.
    """

    variant: str
    round: int
    calm: float
    busy: float
    after: float
    came_s: float
    went_s: float
    token_s: tuple[float, ...]

    def each_second(self) -> list[int]:
        """How many tokens came in each second."""
        counts = [0] * (int(max(self.token_s, default=0.0)) + 1)
        for at_s in self.token_s:
            counts[int(at_s)] += 1
        return counts


def play(subject: Subject, number: int, seed: int, n_predict: int) -> Adaptation:
    """Eight clients all the time; neighbours on every processor come, and go again."""
    ended = threading.Event()
    times: list[float] = []

    def client(prompts: list[str]) -> None:
        for prompt in prompts:
            if ended.is_set():
                return
            messages = [said_by("user", prompt)]
            attempt(subject.url, messages, n_predict, timeout_s=60, ended=ended, on_text=times.append)

    prompts = draw(_CLIENTS * 200, seed)
    began = time.monotonic()
    threads = [threading.Thread(target=client, args=(prompts[i::_CLIENTS],), daemon=True) for i in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(_WARM_UP_S + _CALM_S)
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
        tuple(sorted(at_s - began for at_s in times)),
    )
