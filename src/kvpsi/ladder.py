"""What gives memory, and in which order: what takes least work to have again goes first, what is lost for good last."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass

LOSSY = math.inf


@dataclass(frozen=True, slots=True)
class Offer:
    """What could be given next.

    Attributes:
        n_bytes: how much.
        cost_s: seconds of work until it is there again, `LOSSY` if it never is.
    """

    n_bytes: int
    cost_s: float

    @property
    def cost_s_per_byte(self) -> float:
        """What the ladder compares."""
        return self.cost_s / max(1, self.n_bytes)


class Rung(ABC):
    """One way to give memory. ``name`` is what its bytes are counted under."""

    name: str

    @abstractmethod
    def offer(self) -> Offer | None:
        """The cheapest that it has, None if it has nothing. Nothing is changed."""

    @abstractmethod
    def give(self, n_bytes: int) -> int:
        """Give so much, or the least that it can give at once; the bytes that really went."""


class Ladder:
    """Several rungs, of which the cheapest is taken each time; of equally cheap ones the first.

    Attributes:
        given_bytes: what each has given so far, by its name.
    """

    def __init__(self, rungs: Sequence[Rung]) -> None:
        self._rungs = tuple(rungs)
        self.given_bytes = {rung.name: 0 for rung in rungs}

    def give(self, n_bytes: int, *, sparing: Collection[str] = ()) -> int:
        """Give at least so much, less if there is not so much; the bytes that really went.

        Args:
            n_bytes: how much.
            sparing: names of rungs that are to be left alone.
        """
        given = 0
        useless = set(sparing)
        while given < n_bytes:
            offers = [
                (offer.cost_s_per_byte, n, rung)
                for n, rung in enumerate(self._rungs)
                if rung.name not in useless and (offer := rung.offer())
            ]
            if not offers:
                break
            rung = min(offers, key=lambda each: each[:2])[2]
            got = rung.give(n_bytes - given)
            if got <= 0:  # it offered what it does not have
                useless.add(rung.name)
            given += got
            self.given_bytes[rung.name] += got
        return given
