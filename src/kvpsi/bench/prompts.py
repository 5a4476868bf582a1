"""Prompts of about the same length, each different from its first words on, so that no server has read them before."""

from __future__ import annotations

import random

_SUBJECTS = ("harbour", "forest", "kitchen", "railway", "garden", "library", "mountain", "workshop", "market", "island")
_ADJECTIVES = ("quiet", "busy", "old", "bright", "narrow", "windy", "famous", "hidden", "modern", "colourful")
_ACTIONS = ("repairs", "paints", "describes", "visits", "measures", "remembers", "guards", "sells", "draws", "cleans")
TOKENS_OF_A_SENTENCE = 11


def draw(count: int, seed: int, n_sentences: int = 4) -> list[str]:
    """So many prompts, of about 60 tokens with four sentences; the same seed draws the same ones."""
    rng = random.Random(seed)
    return [_prompt(rng, number, n_sentences) for number in range(count)]


def draw_varied(count: int, seed: int) -> list[str]:
    """So many prompts of 40 to 140 tokens, of which none begins like another; the same seed draws the same ones."""
    rng = random.Random(seed)
    return [_prompt(rng, number, rng.randint(2, 10)) for number in range(count)]


def _prompt(rng: random.Random, number: int, n_sentences: int) -> str:
    sentences = [
        f"Person {rng.randrange(1000)} {rng.choice(_ACTIONS)} the {rng.choice(_ADJECTIVES)} {rng.choice(_SUBJECTS)}."
        for _ in range(n_sentences)
    ]
    return f"Story {number}-{rng.randrange(10_000)}. {' '.join(sentences)} Write what happens next, in detail."
