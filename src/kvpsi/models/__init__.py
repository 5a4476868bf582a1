"""The model store: models known by name, where they lie, how they get there, whether a file is sound."""

from kvpsi.models.catalog import DEFAULT_MODEL, MODELS, NamedModel
from kvpsi.models.gguf import GgufInfo, check_gguf
from kvpsi.models.store import (
    Progress,
    ReportProgress,
    cache_dir,
    cached_model_path,
    default_model_path,
    pull,
    read_header,
)

__all__ = [
    "DEFAULT_MODEL",
    "MODELS",
    "GgufInfo",
    "NamedModel",
    "Progress",
    "ReportProgress",
    "cache_dir",
    "cached_model_path",
    "check_gguf",
    "default_model_path",
    "pull",
    "read_header",
]
