"""Eviction policies, one file each."""

from collections.abc import Callable, Mapping

from kvpsi.errors import UsageError
from kvpsi.kv.policies.attention import Attention
from kvpsi.kv.policies.auto import Auto
from kvpsi.kv.policies.base import CellView, EvictionPolicy
from kvpsi.kv.policies.keydiff import KeyDiff
from kvpsi.kv.policies.lru import LeastRecentlyUsed
from kvpsi.kv.policies.random import Random
from kvpsi.kv.policies.streaming import Streaming

POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = {
    "auto": Auto,
    "streaming": Streaming,
    "lru": LeastRecentlyUsed,
    "attention": Attention,
    "keydiff": KeyDiff,
    "random": Random,
}
"""All of them by the name that users know."""


def policy_named(name: str) -> EvictionPolicy:
    """The policy of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in POLICIES:
        raise UsageError(f"There is no policy {name!r}; use one of {', '.join(POLICIES)} with --policy.")
    return POLICIES[name]()


__all__ = [
    "POLICIES",
    "Attention",
    "Auto",
    "CellView",
    "EvictionPolicy",
    "KeyDiff",
    "LeastRecentlyUsed",
    "Random",
    "Streaming",
    "policy_named",
]
