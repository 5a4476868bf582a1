"""Prompts of about the same length, each different from its first words on, so that no server has read them before."""

from __future__ import annotations

import random

_SUBJECTS = ("harbour", "forest", "kitchen", "railway", "garden", "library", "mountain", "workshop", "market", "island")
_ADJECTIVES = ("quiet", "busy", "old", "bright", "narrow", "windy", "famous", "hidden", "modern", "colourful")
_ACTIONS = ("repairs", "paints", "describes", "visits", "measures", "remembers", "guards", "sells", "draws", "cleans")
_N_SENTENCES = 4


def draw(count: int, seed: int) -> list[str]:
    """So many prompts of about 60 tokens; the same seed draws the same ones."""
    rng = random.Random(seed)
    return [_prompt(rng, number) for number in range(count)]


def _prompt(rng: random.Random, number: int) -> str:
    sentences = [
        f"Person {rng.randrange(1000)} {rng.choice(_ACTIONS)} the {rng.choice(_ADJECTIVES)} {rng.choice(_SUBJECTS)}."
        for _ in range(_N_SENTENCES)
    ]
    return f"Story {number}-{rng.randrange(10_000)}. {' '.join(sentences)} Write what happens next, in detail."
