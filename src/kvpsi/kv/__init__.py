"""Act: elastic memory for llama.cpp contexts."""

from kvpsi.kv.elastic import CacheSettings, ElasticCache, Forgotten, Trim
from kvpsi.kv.tracker import Release

__all__ = ["CacheSettings", "ElasticCache", "Forgotten", "Release", "Trim"]
