"""How small a cache can get: the same arithmetic for one cache, the boards of a fleet, and what fits."""

from __future__ import annotations

from dataclasses import dataclass

from kvpsi.kv import CacheSettings
from kvpsi.sim.llms import Llm


@dataclass(frozen=True, slots=True)
class Floor:
    """Parts of it, in tokens, as `kvpsi.kv.ElasticCache.floor_cells` adds them up::

        floor = max(least_protected, sum over sequences of min(held, most_protected)) + spare

    Attributes:
        least_protected: of the cache, even an empty one: beginning and end of one sequence.
        most_protected: of each sequence: these, and the first and the last turn.
        spare: room for one eviction.
    """

    least_protected: int
    most_protected: int
    spare: int

    @classmethod
    def of(cls, llm: Llm, settings: CacheSettings) -> Floor:
        """Of a model's cache."""
        least = settings.keep + settings.tail
        return cls(least, least + 2 * settings.turn, settings.min_prune + llm.block_tokens)

    @property
    def of_a_long_one(self) -> int:
        """The floor while one sequence is held, of which more could go."""
        return self.most_protected + self.spare
