"""A model that nobody is asking just now: the end of what it holds can go, and is read again when it is wanted."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import llama_cpp

from kvpsi.kv import ElasticCache
from kvpsi.ladder import Offer, Rung

_SUPPOSED_S_PER_TOKEN = 0.01
_SEQUENCE = 0


class Resting(Rung):
    """Between two calls of `llama_cpp.Llama.generate` nothing is forgotten: the last tokens go first, and the model
    evaluates them again before anything else. The governor's thread has it give, under the cache's lock.

    Args:
        llm: the model, kept alive by whoever keeps this.
        cache: its cache.
    """

    name = "resting"

    def __init__(self, llm: llama_cpp.Llama, cache: ElasticCache) -> None:
        self._llm = weakref.ref(llm)
        self._cache = weakref.ref(cache)
        self._n_requests = 0
        self._rests = False
        self._dropped: range | None = None

    # -- what the model does -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Somebody asks."""
        self._n_requests += 1

    def end(self) -> None:
        """It has been answered."""
        self._n_requests -= 1
        self._rests = True

    def forget(self) -> None:
        """What was dropped is not wanted any more."""
        self._dropped = None

    def restore(self, evaluate: Callable[[list[int]], Any]) -> int:
        """Have evaluated what was dropped, unless the model was reset meanwhile; how many tokens."""
        dropped, llm = self._dropped, self._llm()
        self._dropped = None
        if dropped is None or llm is None or llm.n_tokens != dropped.start:
            return 0
        rested, self._rests = self._rests, False  # or what is evaluated might be dropped again meanwhile
        try:
            evaluate(llm.input_ids[dropped.start : dropped.stop].tolist())
        except BaseException:
            self._dropped = range(llm.n_tokens, dropped.stop)
            raise
        finally:
            self._rests = rested
        return len(dropped)

    @property
    def dropped_tokens(self) -> int:
        """How many would have to be evaluated again."""
        return len(self._dropped or ())

    def use(self, evaluate: Callable[[list[int]], Any]) -> None:
        """Somebody evaluates tokens himself: what was dropped must be there, and nothing rests any more."""
        if not self._n_requests:
            self._rests = False
            self.restore(evaluate)

    # -- what the ladder asks ------------------------------------------------------------------------------------

    def _held(self) -> list[int]:
        """Positions that may go, in order."""
        cache = self._cache()
        if cache is None or not self._rests or self._n_requests or not cache.may_be_cut:
            return []
        return cache.positions(_SEQUENCE)

    def offer(self) -> Offer | None:
        """All that it holds, at the cost of evaluating it again."""
        n_tokens, cache = len(self._held()), self._cache()
        if not n_tokens or cache is None:
            return None
        return Offer(n_tokens * cache.bytes_per_cell, n_tokens * _SUPPOSED_S_PER_TOKEN)

    def give(self, n_bytes: int) -> int:
        """Drop the last tokens."""
        held, cache, llm = self._held(), self._cache(), self._llm()
        if not held or cache is None or llm is None:
            return 0
        n_cells = min(len(held), max(-(-n_bytes // cache.bytes_per_cell), cache.settings.min_prune))
        cut = held[-n_cells]
        if not cache.seq_rm(_SEQUENCE, cut, -1):
            return 0
        end = self._dropped.stop if self._dropped and self._dropped.start == llm.n_tokens else llm.n_tokens
        self._dropped = range(cut, end)
        llm.n_tokens = cut
        llm._requires_eval = True
        return n_cells * cache.bytes_per_cell
