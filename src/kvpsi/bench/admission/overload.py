"""Twice as many requests as can be answered, whose clients come again when they were told to."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from dataclasses import dataclass

from kvpsi.bench.admission.clients import Asker, arrivals, closed_loop, together
from kvpsi.bench.admission.plan import Plan
from kvpsi.bench.admission.server import Subject
from kvpsi.bench.client import Attempt, attempt, said_by
from kvpsi.bench.prompts import draw_varied

_FACTOR = 2.0
_CLIENTS = 8
_MEASURED_S = 40.0
_LONGEST_S = 240.0
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Overload:
    """What came of it; rates in requests a second.

    ``goodput`` are answers within the deadline of their attempt that ended in the measured minute. It begins when
    the load has been there for as long as the deadline, so that as many answers are on their way when it begins as when
    it ends. Of ``honoured`` clients that came again when they were told, ``kept`` were answered within the deadline
    then. ``told_nothing`` were turned away without a time, ``told_too_long`` with one that the bench does not wait for,
    which counts as not kept.
    """

    variant: str
    sustainable: float
    offered: float
    goodput: float
    requests: int
    rejected: int
    told_nothing: int
    told_too_long: int
    honoured: int
    kept: int
    most_waiting: int
    latest_retry_s: float


def play(plan: Plan, subject: Subject, seed: int) -> Overload:
    """Eight clients in a closed loop tell what can be sustained; then twice that comes, for a minute and a half."""
    asker = Asker(subject.url, plan.n_predict, plan.deadline_s)
    with subject.pressed():
        began = time.monotonic()
        calm = closed_loop(asker, draw_varied(_CLIENTS * 100, seed), _CLIENTS, _MEASURED_S)
        sustainable = sum(o.answered for o in calm) / (time.monotonic() - began)
        return _overload(plan, subject, sustainable, seed + 1)


def _overload(plan: Plan, subject: Subject, sustainable: float, seed: int) -> Overload:
    from_s, until_s = plan.deadline_s, plan.deadline_s + plan.open_s
    times = arrivals(_FACTOR * max(sustainable, 0.05), until_s, seed)
    prompts = draw_varied(len(times), seed)
    began = time.monotonic()
    attempts: list[tuple[float, Attempt]] = []
    again: list[tuple[float, Attempt]] = []

    def once(prompt: str, into: list[tuple[float, Attempt]]) -> Attempt:
        at_s = time.monotonic() - began
        headers = {"Prefer": f"wait={plan.deadline_s:g}"}
        made = attempt(
            subject.url, [said_by("user", prompt)], plan.n_predict, headers=headers, timeout_s=3 * plan.deadline_s
        )
        into.append((at_s, made))
        return made

    def client(prompt: str, at_s: float) -> None:
        time.sleep(max(0.0, began + at_s - time.monotonic()))
        made = once(prompt, attempts)
        if made.status == 429 and made.retry_after_s is not None and made.retry_after_s < _LONGEST_S:
            time.sleep(made.retry_after_s)
            once(prompt, again)

    ended = threading.Event()
    waiting: list[int] = [0]

    def watch() -> None:
        while not ended.wait(_LOOK_S):
            with contextlib.suppress(OSError):  # it is being ended, as after Ctrl-C
                waiting.append(subject.status()["waiting"])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        together([functools.partial(client, *each) for each in zip(prompts, times, strict=True)])
    finally:
        ended.set()
        watcher.join()

    def in_time(made: Attempt) -> bool:
        return not made.problem and made.seconds <= plan.deadline_s

    good = [at_s + made.seconds for at_s, made in (*attempts, *again) if in_time(made)]
    rejected = [made for _, made in attempts if made.status == 429]
    return Overload(
        subject.variant,
        sustainable,
        len(times) / until_s,
        sum(from_s < end_s <= until_s for end_s in good) / plan.open_s,
        len(times),
        len(rejected),
        sum(made.retry_after_s is None for made in rejected),
        sum((made.retry_after_s or 0.0) >= _LONGEST_S for made in rejected),
        len(again),
        sum(in_time(made) for _, made in again),
        max(waiting),
        max((made.retry_after_s or 0.0 for made in rejected), default=0.0),
    )
