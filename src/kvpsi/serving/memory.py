"""What the server's memory is to a governor: the cache and the saved conversations, under one limit."""

from __future__ import annotations

from collections.abc import Callable

from kvpsi.kv import ElasticCache
from kvpsi.kv.fixed import FixedCache
from kvpsi.kv.forgetting import Forgetting
from kvpsi.ladder import Ladder
from kvpsi.serving.context import ServedContext
from kvpsi.serving.rungs import LIVE
from kvpsi.serving.sessions import Sessions
from kvpsi.status import CacheStatus


class CacheMemory:
    """A governor's view of both (see `kvpsi.governor.Governed`), and the engine's way to make room.

    The cheapest goes first, see `kvpsi.serving.rungs`.

    Args:
        context: whose cache it is.
        sessions: that lie outside of it.
        ladder: what gives room.
        shrink_if_idle: has the engine give what is above the limit, and tells the bytes; None if it is busy.
        lossless_cells: cells that could be given without that anything is forgotten.
    """

    def __init__(
        self,
        context: ServedContext,
        sessions: Sessions,
        ladder: Ladder,
        shrink_if_idle: Callable[[], int | None],
        lossless_cells: Callable[[], int],
    ) -> None:
        self.sessions = sessions
        self.ladder = ladder
        self._context = context
        self._shrink_if_idle = shrink_if_idle
        self._lossless_cells = lossless_cells

    @property
    def cache(self) -> ElasticCache | FixedCache:
        """The cache as it is now: growing makes another."""
        return self._context.cache

    @property
    def returned_bytes(self) -> int:
        """All that ever went back to the system."""
        given = self.ladder.given_bytes
        return self.cache.returned_bytes + sum(given[name] for name in given if name not in LIVE)

    @property
    def given_bytes(self) -> dict[str, int]:
        """What ever went, by what was given up: unused pages (``slack``) and the rungs of the ladder."""
        given = self.ladder.given_bytes
        slack = max(0, self.cache.returned_bytes - sum(given[name] for name in given if name in LIVE))
        return {"slack": slack, **given}

    # -- for the governor, from any thread -----------------------------------------------------------------------

    def status(self) -> CacheStatus:
        """Sizes as of now; saved conversations count as in use."""
        inner = self.cache.status()
        used = min(inner.capacity_bytes, inner.used_bytes + self.sessions.n_bytes)
        loading = max(inner.loading_bytes, self._context.growing_bytes, self.sessions.loading_bytes)
        lossless = min(used, self.sessions.n_bytes + self._lossless_cells() * self.cache.bytes_per_cell)
        return CacheStatus(
            inner.capacity_bytes,
            used,
            inner.floor_bytes,
            self.returned_bytes,
            loading,
            lossless_bytes=lossless,
            forgotten_bytes=inner.forgotten_bytes,
        )

    def set_limit(self, limit_bytes: int, chunk_tokens: int | None) -> None:
        """Set the gate of the cache, which counts for the saved conversations as well."""
        self.cache.set_limit(limit_bytes, chunk_tokens)

    def give_now(self) -> int | None:
        """Have the engine shrink to the limit if it is idle; the bytes given, None if it is busy."""
        return self._shrink_if_idle()

    def interrupt(self) -> bool:
        """Stop what is being decoded, so that room is made first."""
        return self.cache.interrupt()

    # -- for the engine's thread ---------------------------------------------------------------------------------

    def room_cells(self) -> int:
        """Cells that could be taken if all saved conversations were dropped."""
        return max(0, self.cache.allowed_cells - self.cache.used_cells)

    def missing_cells(self, n_tokens: int) -> int:
        """Cells that would have to go before so many more can be taken."""
        saved_cells = -(-(self.sessions.n_bytes + self.sessions.loading_bytes) // self.cache.bytes_per_cell)
        return max(0, self.cache.used_cells + saved_cells + n_tokens - self.cache.allowed_cells)

    def make_room(self, n_tokens: int, *, of_the_saved_only: bool = False) -> int:
        """Have the cheapest go until so many cells more can be taken; the cells that are missing all the same.

        Nothing is forgotten because the context is full: then an answer ends.
        """
        cache = self.cache
        is_full_of_its_own_accord = min(cache.limit_cells, cache.cap_cells) >= cache.n_cells
        if missing := self.missing_cells(n_tokens):
            spared = LIVE if of_the_saved_only else {Forgetting.name} if is_full_of_its_own_accord else ()
            self.ladder.give(missing * cache.bytes_per_cell, sparing=spared)
        return self.missing_cells(n_tokens) if missing else 0
