"""Eviction policies, one file each."""

from kvpsi.kv.policies.base import CellView, EvictionPolicy
from kvpsi.kv.policies.streaming import Streaming

__all__ = ["CellView", "EvictionPolicy", "Streaming"]
