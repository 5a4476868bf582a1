"""Whether answers that are being written keep their pace while others come, one of them with a long prompt."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass

from kvpsi.bench.admission.plan import Plan, Scenario
from kvpsi.bench.admission.server import Subject
from kvpsi.bench.client import Attempt, attempt, said_by
from kvpsi.bench.prompts import TOKENS_OF_A_SENTENCE, draw

_WARM_UP_S = 4.0
_CALM_S = 12.0
_LIMIT_S = 150.0
_NEWCOMERS = 8
_LONG_TOKENS = 2000
_STREAM_TOKENS = 1500


@dataclass(frozen=True, slots=True)
class Pace:
    """Gaps between two tokens of the streams, in seconds, before and while others come.

    ``long_first_token_s`` is how long the client with the long prompt waited for its first token, None if it had none
    in time; ``newcomers_s`` are the first tokens of the others that had one meanwhile.
    """

    variant: str
    scenario: Scenario
    calm_s: tuple[float, ...]
    pressed_s: tuple[float, ...]
    long_first_token_s: float | None
    newcomers_s: tuple[float, ...]


def play(plan: Plan, subject: Subject, seed: int) -> Pace:
    """Streams alone for a while; then eight requests and a prompt of 2,000 tokens, until that has been read."""
    ended = threading.Event()
    prompts = draw(plan.streams + _NEWCOMERS, seed)
    long = draw(1, seed + 1, _LONG_TOKENS // TOKENS_OF_A_SENTENCE)[0]
    times: list[tuple[float, Attempt]] = []

    def stream(prompt: str) -> None:
        began = time.monotonic()
        messages, most_s = [said_by("user", prompt)], _LIMIT_S + 60
        made = attempt(subject.url, messages, _STREAM_TOKENS, timeout_s=most_s, ended=ended, ignore_eos=True)
        times.append((began, made))

    firsts: list[float] = []
    long_first: list[float] = []

    def newcomer(prompt: str, n_predict: int, into: list[float]) -> None:
        made = attempt(subject.url, [said_by("user", prompt)], n_predict, timeout_s=_LIMIT_S, ended=ended)
        into.extend(made.text_s[:1])

    with subject.pressed():
        streams = [threading.Thread(target=stream, args=(prompt,)) for prompt in prompts[: plan.streams]]
        for thread in streams:
            thread.start()
        time.sleep(_WARM_UP_S + _CALM_S)
        came_s = time.monotonic()
        long_one = threading.Thread(target=newcomer, args=(long, 1, long_first))
        others = [
            threading.Thread(target=newcomer, args=(prompt, plan.n_predict, firsts), daemon=True)
            for prompt in prompts[plan.streams :]
        ]
        for thread in (long_one, *others):
            thread.start()
        long_one.join(_LIMIT_S)
        over_s = time.monotonic()
        ended.set()
        for thread in streams:
            thread.join()
    calm, pressed = [], []
    for began, made in times:
        at_s = [began + text_s for text_s in made.text_s]
        for a, b in itertools.pairwise(at_s):
            if came_s - _CALM_S <= a and b <= came_s:
                calm.append(b - a)
            elif b > came_s and a < over_s:
                pressed.append(b - a)
    return Pace(
        subject.variant,
        subject.scenario,
        tuple(calm),
        tuple(pressed),
        long_first[0] if long_first else None,
        tuple(firsts),
    )
