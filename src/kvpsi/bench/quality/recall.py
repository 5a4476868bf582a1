"""Facts that are planted in a text, and asked for before and after part of it was forgotten."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

_THINGS = (
    "lighthouse", "old mill", "iron gate", "north tower", "wine cellar", "town library", "ferry boat", "clock shop",
    "stone bridge", "rose garden", "post office", "blue barn", "coal mine", "theatre door", "fish market", "water pump",
    "chapel bell", "toy museum", "ski lodge", "bakery oven", "grain silo", "railway shed", "dance hall", "salt works",
)  # fmt: skip
MOST_FACTS = len(_THINGS)


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that a text says once, in the middle of other things."""

    thing: str
    number: str

    @property
    def sentence(self) -> str:
        """How the text says it."""
        return f" The secret number of the {self.thing} is {self.number}."

    @property
    def question(self) -> str:
        """How it is asked for."""
        return f"\n\nQuestion: What is the secret number of the {self.thing}?\nAnswer:"

    @property
    def answer(self) -> str:
        """What the answer begins with."""
        return f" The secret number of the {self.thing} is"


def draw(count: int, seed: int) -> list[Fact]:
    """So many different facts."""
    rng = random.Random(seed)
    return [Fact(thing, str(rng.randrange(10_000, 100_000))) for thing in rng.sample(_THINGS, count)]


def plant(document: Sequence[int], sentences: Sequence[Sequence[int]]) -> list[int]:
    """A document with the sentences spread evenly over it, the first and last not at its ends."""
    step = len(document) / len(sentences)
    found: list[int] = []
    for number, sentence in enumerate(sentences):
        found += document[int(number * step) : int((number + 0.5) * step)]
        found += sentence
        found += document[int((number + 0.5) * step) : int((number + 1) * step)]
    return found
