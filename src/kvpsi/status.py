"""What a cache tells of its sizes: the only thing that the law knows of it, and all that it needs from one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """The cache as the law sees it, in bytes.

    Attributes:
        capacity_bytes: its full size.
        used_bytes: what tokens occupy.
        floor_bytes: what it cannot go below.
        returned_bytes: all that it ever gave back, a counter.
        loading_bytes: how much of what is occupied is being taken right now, all at once (a saved conversation).
        lossless_bytes: how much of what is occupied could be given without that anything is forgotten.
        forgotten_bytes: what all tokens occupied that were ever forgotten, a counter.
    """

    capacity_bytes: int
    used_bytes: int
    floor_bytes: int
    returned_bytes: int = 0
    loading_bytes: int = 0
    lossless_bytes: int = 0
    forgotten_bytes: int = 0
