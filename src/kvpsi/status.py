"""What a cache tells of its sizes: the only thing that the law knows of it, and all that it needs from one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """The cache as the law sees it, in bytes: its full size, what tokens occupy, what it cannot go below, all that it
    ever gave back (a counter), and how much of what is occupied is being taken right now, all at once (a saved
    conversation)."""

    capacity_bytes: int
    used_bytes: int
    floor_bytes: int
    returned_bytes: int = 0
    loading_bytes: int = 0
