"""What `kvpsi bench pressure` does."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from kvpsi.board import BoardSettings
from kvpsi.engines.loading import LoadSettings
from kvpsi.errors import UsageError
from kvpsi.hog import HogSettings
from kvpsi.kv import CacheSettings

Variant = Literal["calm", "fixed", "prune", "kvpsi", "kvpsi-locked", "kvpsi-populated"]
"""``fixed`` is stock llama-cpp-python; ``prune`` drops the oldest tokens while avg10 is high and returns nothing;
``kvpsi`` is governed, and ``calm`` the same without a neighbour. ``kvpsi-locked`` has its weights locked into memory,
``kvpsi-populated`` reads them back at once whenever it gave memory."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One comparison.

    Attributes:
        model: the GGUF file.
        board: the machine that model and neighbour share.
        hog: the neighbour; it stays until the model is done, whatever its ``hold_s``.
        n_ctx: context in tokens.
        prompt_tokens: what the model holds at first; read once, saved, and loaded by every run.
        calm_tokens: generated before the neighbour begins.
        n_predict: generated beside it, and by a governed model once more without it, its cache kept as small.
        read_tokens: read by a governed model after each of the two; 0: nothing.
        keep, tail, min_prune: as for `kvpsi generate`.
        n_threads: of the model; one leaves the other core of a small machine to the neighbour.
        variants: in the order in which they run first; the next round runs them backwards, and so on.
        rounds: how often each runs.
        cooldown_s: pause between two runs.
        limit_s: the longest that one run generates under pressure.
        prune_threshold: avg10 of memory stall (a share) from which on ``prune`` drops tokens.
    """

    model: Path
    board: BoardSettings = field(default_factory=lambda: BoardSettings(600 << 20, swap="zram"))
    hog: HogSettings = field(default_factory=lambda: HogSettings(300 << 20, 2 << 20, 0.5, 100 << 20))
    n_ctx: int = 16384
    prompt_tokens: int = 6000
    calm_tokens: int = 50
    n_predict: int = 200
    read_tokens: int = 1024
    keep: int = 16
    tail: int = 256
    min_prune: int = 64
    n_threads: int = 1
    variants: tuple[Variant, ...] = ("calm", "fixed", "prune", "kvpsi")
    rounds: int = 2
    cooldown_s: float = 5.0
    limit_s: float = 120.0
    prune_threshold: float = 0.10

    def __post_init__(self) -> None:
        known = ", ".join(get_args(Variant))
        if not self.variants or not set(self.variants) <= set(get_args(Variant)):
            raise UsageError(f"The variants are {known}, not {','.join(self.variants)}.")
        if len(set(self.variants)) < len(self.variants):
            raise UsageError(f"Name each variant once: {known}.")
        needed = self.prompt_tokens + self.calm_tokens + 2 * (self.n_predict + self.read_tokens)
        if needed > self.n_ctx:
            raise UsageError(
                f"{self.prompt_tokens} tokens of prompt, {self.calm_tokens} generated ones, and twice {self.n_predict} "
                f"generated and {self.read_tokens} read ones do not fit into a context of {self.n_ctx}; "
                "raise -c or lower -n."
            )
        for name in ("prompt_tokens", "calm_tokens", "n_predict", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; give at least 1.")
        if self.read_tokens < 0:
            raise UsageError(f"read_tokens is {self.read_tokens}; give 0 or more.")
        if not 0 <= self.cooldown_s < math.inf or not 0 < self.limit_s < math.inf:
            raise UsageError("The pause between runs is 0 s or more and their limit above 0 s, and both are numbers.")
        LoadSettings(self.n_ctx, self.n_threads)  # complains of what llama.cpp would not take
        CacheSettings(self.keep, self.tail, self.min_prune)
        if not 0 < self.prune_threshold <= 1:
            raise UsageError("The threshold for pruning is a share above 0 and at most 1, such as 0.1.")

    def order(self, round_number: int) -> tuple[Variant, ...]:
        """The variants in the order of one round."""
        return self.variants if round_number % 2 == 0 else self.variants[::-1]
