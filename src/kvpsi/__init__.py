"""kvpsi: a llama.cpp runtime that gives memory back when others need it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpsi.engines.llama import GovernedLlama, Summary, govern, set_cache_limit
    from kvpsi.errors import CacheRefusedError, KvpsiError, LayoutError
    from kvpsi.governor import Governor, LawSettings
    from kvpsi.instrument import Instrument, JsonLines
    from kvpsi.kv import CacheSettings, ElasticCache
    from kvpsi.pressure import Monitor, Reading

__version__ = "0.1.0"

_HOME = {
    "CacheRefusedError": "kvpsi.errors",
    "CacheSettings": "kvpsi.kv",
    "ElasticCache": "kvpsi.kv",
    "GovernedLlama": "kvpsi.engines.llama",
    "Governor": "kvpsi.governor",
    "Instrument": "kvpsi.instrument",
    "JsonLines": "kvpsi.instrument",
    "KvpsiError": "kvpsi.errors",
    "LawSettings": "kvpsi.governor",
    "LayoutError": "kvpsi.errors",
    "Monitor": "kvpsi.pressure",
    "Reading": "kvpsi.pressure",
    "Summary": "kvpsi.engines.llama",
    "govern": "kvpsi.engines.llama",
    "set_cache_limit": "kvpsi.engines.llama",
}

__all__ = [
    "CacheRefusedError",
    "CacheSettings",
    "ElasticCache",
    "GovernedLlama",
    "Governor",
    "Instrument",
    "JsonLines",
    "KvpsiError",
    "LawSettings",
    "LayoutError",
    "Monitor",
    "Reading",
    "Summary",
    "govern",
    "set_cache_limit",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``kvpsi --version`` does not load llama.cpp."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """Also the names that are imported on first use."""
    return sorted({*globals(), *__all__})
