"""The last rung of the ladder: tokens of a live conversation are forgotten, as the policy chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvpsi.ladder import LOSSY, Offer, Rung


class Forgets(Protocol):
    """What can forget; every `kvpsi.kv.GatedCache` does."""

    @property
    def forgettable_bytes(self) -> int:
        """How much an eviction could take."""
        ...

    def forget(self, n_bytes: int) -> int:
        """Forget so much, or a little more; the bytes that became free."""
        ...


class Forgetting(Rung):
    """All that is not protected.

    Args:
        cache: tells whose tokens, as it is now; None where it is gone.
    """

    name = "forgotten"

    def __init__(self, cache: Callable[[], Forgets | None]) -> None:
        self._cache = cache

    def offer(self) -> Offer | None:
        """It is lost, unless it is read again later."""
        cache = self._cache()
        n_bytes = cache.forgettable_bytes if cache is not None else 0
        return Offer(n_bytes, LOSSY) if n_bytes > 0 else None

    def give(self, n_bytes: int) -> int:
        """Have it forgotten."""
        cache = self._cache()
        return cache.forget(n_bytes) if cache is not None else 0
