"""Act: elastic memory for llama.cpp contexts."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpsi.kv.elastic import ElasticCache
    from kvpsi.kv.gated import CacheSettings, Forgotten, GatedCache, Trim
    from kvpsi.kv.rebuild import Rebuild, RebuildSettings, RebuiltCache
    from kvpsi.kv.tracker import Release

_HOME = {
    "CacheSettings": "kvpsi.kv.gated",
    "ElasticCache": "kvpsi.kv.elastic",
    "Forgotten": "kvpsi.kv.gated",
    "GatedCache": "kvpsi.kv.gated",
    "Rebuild": "kvpsi.kv.rebuild",
    "RebuildSettings": "kvpsi.kv.rebuild",
    "RebuiltCache": "kvpsi.kv.rebuild",
    "Release": "kvpsi.kv.tracker",
    "Trim": "kvpsi.kv.gated",
}

__all__ = [
    "CacheSettings",
    "ElasticCache",
    "Forgotten",
    "GatedCache",
    "Rebuild",
    "RebuildSettings",
    "RebuiltCache",
    "Release",
    "Trim",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that other engines have `kvpsi.kv.pages` without llama.cpp."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
