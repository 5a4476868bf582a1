"""Resizing a context as a whole, where its pages cannot be given back one by one."""

from kvpsi.kv.rebuild.cache import RebuiltCache
from kvpsi.kv.rebuild.context import ContextHolder, Rebuild
from kvpsi.kv.rebuild.sizes import RebuildSettings

__all__ = ["ContextHolder", "Rebuild", "RebuildSettings", "RebuiltCache"]
