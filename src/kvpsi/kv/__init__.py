"""Act: elastic memory for llama.cpp contexts."""

from kvpsi.kv.elastic import ElasticCache
from kvpsi.kv.gated import CacheSettings, Forgotten, GatedCache, Trim
from kvpsi.kv.rebuild import Rebuild, RebuildSettings, RebuiltCache
from kvpsi.kv.tracker import Release

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
