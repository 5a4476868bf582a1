"""Clients in a closed loop, who ask again when they are answered, and in an open one, who come when they come."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvpsi.bench.client import Attempt, attempt, said_by

_LEAST_S = 0.05


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question as its client saw it, from the first attempt to the end of the last; times in seconds.

    Attributes:
        sent_s: after the beginning of the play.
        latency_s: to the end, the time in which it was told to wait included.
        first_token_s: the same, to the first text; 0 if there was none.
        gaps_s: between two pieces of text.
        attempts: that it took.
        answered: whether there was a whole answer.
        cut: whether it was not waited for any longer, so that it would have taken more than ``latency_s``.
        rejected: whether it was turned away in the end.
        told_s: after which it might have come again then.
        problem: what else went wrong.
    """

    sent_s: float
    latency_s: float
    first_token_s: float = 0.0
    gaps_s: tuple[float, ...] = ()
    n_tokens: int = 0
    attempts: int = 1
    answered: bool = False
    cut: bool = False
    rejected: bool = False
    told_s: float = 0.0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Asker:
    """How questions are asked.

    Attributes:
        url: of whom.
        n_predict: tokens of an answer, at most.
        deadline_s: after which an answer is worth nothing: the server is told how much of it is left, and nobody tries
            again later.
    """

    url: str
    n_predict: int
    deadline_s: float

    def ask(self, prompt: str, began_s: float, until_s: float) -> Outcome:
        """Ask, and again when the server says so while that makes sense; not waited for beyond ``until_s``."""
        sent_s = time.monotonic()
        n_attempts = 0
        while True:
            n_attempts += 1
            before_s = time.monotonic() - sent_s
            left_s = max(_LEAST_S, until_s - time.monotonic())
            messages = [said_by("user", prompt)]
            headers = {"Prefer": f"wait={max(1.0, self.deadline_s - before_s):.1f}"}
            made = attempt(self.url, messages, self.n_predict, headers=headers, timeout_s=left_s)
            again_s = made.retry_after_s
            if made.status != 429 or again_s is None:
                break
            if before_s + made.seconds + again_s > self.deadline_s or time.monotonic() + again_s > until_s:
                break
            time.sleep(again_s)
        return outcome(made, sent_s - began_s, before_s, n_attempts)


def outcome(made: Attempt, sent_s: float, before_s: float, n_attempts: int = 1) -> Outcome:
    """What came of the last attempt, ``before_s`` after the first."""
    return Outcome(
        sent_s=sent_s,
        latency_s=before_s + made.seconds,
        first_token_s=before_s + made.text_s[0] if made.text_s else 0.0,
        gaps_s=tuple(b - a for a, b in itertools.pairwise(made.text_s)),
        n_tokens=made.n_tokens if not made.problem else len(made.text_s),
        attempts=n_attempts,
        answered=not made.problem,
        cut=made.cut,
        rejected=made.status == 429,
        told_s=made.retry_after_s or 0.0,
        problem="" if made.cut or made.status == 429 else made.problem,
    )


def closed_loop(asker: Asker, prompts: Sequence[str], n_clients: int, limit_s: float) -> list[Outcome]:
    """So many clients, each with its share of the prompts one after the other; nobody waits beyond the limit.

    Who gives up a question asks the next one when the server said that there is room.
    """
    found: list[Outcome] = []
    began = time.monotonic()

    def client(number: int) -> None:
        for prompt in prompts[number::n_clients]:
            if time.monotonic() - began < limit_s:
                found.append(asked := asker.ask(prompt, began, began + limit_s))
                time.sleep(min(asked.told_s, max(0.0, began + limit_s - time.monotonic())))

    together([lambda number=number: client(number) for number in range(n_clients)])  # type: ignore[misc]
    return found


def arrivals(rate_s: float, seconds: float, seed: int) -> list[float]:
    """When requests come, of which there are so many a second on average (Poisson)."""
    rng, times, now_s = random.Random(seed), [], 0.0
    while (now_s := now_s + rng.expovariate(rate_s)) < seconds:
        times.append(now_s)
    return times


def open_loop(asker: Asker, prompts: Sequence[str], times: Sequence[float], limit_s: float) -> list[Outcome]:
    """One request at each of these times, whatever came of the others; nobody waits beyond the limit."""
    found: list[Outcome] = []
    began = time.monotonic()

    def client(prompt: str, at_s: float) -> None:
        time.sleep(max(0.0, began + at_s - time.monotonic()))
        found.append(asker.ask(prompt, began, began + limit_s))

    together([lambda p=p, t=t: client(p, t) for p, t in zip(prompts, times, strict=False)])  # type: ignore[misc]
    return found


def together(work: Sequence[Callable[[], None]]) -> None:
    """Do all at once, and wait for all of it.

    Raises:
        Exception: one of them failed.
    """
    failed: list[BaseException] = []

    def do(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # told by the thread that waits
            failed.append(error)

    threads = [threading.Thread(target=do, args=(job,), daemon=True) for job in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
