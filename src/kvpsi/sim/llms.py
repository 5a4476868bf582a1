"""Models that can be simulated: what their weights and each token in the cache take, and how fast they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kvpsi.errors import ModelFileError, UsageError
from kvpsi.kv.layout import block_cells_of
from kvpsi.models import MODELS, read_header
from kvpsi.sim.boards import MIB, Board

KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32}
"""Of an element in the cache; q8_0 keeps 32 of them and a scale in 34 bytes."""
_STEP_S = 0.0005
_READ_TOKENS_AT_ONCE = 6.0


@dataclass(frozen=True, slots=True)
class Llm:
    """One model.

    Attributes:
        name: what users call it.
        weights_bytes: of its file.
        bytes_per_token: of K and V in all layers, for each token in the cache.
        row_bytes: of K or V of one token in one layer, whichever is more.
        runtime_bytes: of the process, besides weights and cache.
        n_ctx_train: the longest context that it was trained with.
    """

    name: str
    weights_bytes: int
    bytes_per_token: int
    row_bytes: int = 2048
    runtime_bytes: int = 250 * MIB
    n_ctx_train: int = 131072

    def __post_init__(self) -> None:
        if min(self.weights_bytes, self.bytes_per_token, self.n_ctx_train) < 1 or self.runtime_bytes < 0:
            raise UsageError(f"The sizes of model {self.name} have to be above 0.")

    @property
    def block_tokens(self) -> int:
        """Tokens that are forgotten together, so that whole pages become free."""
        return block_cells_of(self.row_bytes)

    def cache_bytes(self, n_tokens: int) -> int:
        """What so many tokens take in the cache."""
        return n_tokens * self.bytes_per_token


@dataclass(frozen=True, slots=True)
class Speed:
    """How long a model takes, in seconds: ``step_s`` to write a token and ``byte_s`` more for each byte of the cache
    that it attends to, ``read_s`` and ``read_byte_s`` the same for a token of a prompt."""

    step_s: float
    byte_s: float
    read_s: float
    read_byte_s: float

    @classmethod
    def on(cls, board: Board, llm: Llm) -> Speed:
        """Writing is bound by how fast weights and cache come from memory; reading prompts uses each weight for
        several tokens."""
        step_s = _STEP_S + llm.weights_bytes / board.memory_bytes_s
        byte_s = 1 / board.memory_bytes_s
        return cls(step_s, byte_s, step_s / _READ_TOKENS_AT_ONCE, byte_s / _READ_TOKENS_AT_ONCE)

    def token_s(self, cache_bytes: int) -> float:
        """To write one token."""
        return self.step_s + self.byte_s * cache_bytes

    def chunk_s(self, n_tokens: int, cache_bytes: int) -> float:
        """To read so many of a prompt at once."""
        return n_tokens * (self.read_s + self.read_byte_s * cache_bytes)


def _preset(name: str, gib: float, n_layers: int, n_kv_heads: int, head_dim: int, n_ctx_train: int = 131072) -> Llm:
    """A cache of 16-bit numbers: K and V are ``2 * layers * KV heads * head dimension`` elements a token."""
    row_bytes = int(n_kv_heads * head_dim * KV_BYTES["f16"])
    return Llm(name, int(gib * 1024) * MIB, 2 * n_layers * row_bytes, row_bytes, n_ctx_train=n_ctx_train)


LLMS: Mapping[str, Llm] = {
    llm.name: llm
    for llm in (
        # weights at 4 bits (Q4_K_M files); layers, KV heads and their size, and the context, as the makers publish them
        _preset("1b", 0.75, 16, 8, 64),  # Llama 3.2 1B
        _preset("3b", 1.88, 28, 8, 128),  # Llama 3.2 3B
        _preset("7b", 3.80, 32, 32, 128, 4096),  # Llama 2 7B, without grouped queries
        _preset("8b", 4.58, 32, 8, 128),  # Llama 3.1 8B
        _preset("13b", 7.33, 40, 40, 128, 4096),  # Llama 2 13B, without grouped queries
    )
}
"""Presets."""


def with_kv_type(llm: Llm, kv_type: str) -> Llm:
    """The same with another type of cache.

    Raises:
        UsageError: the type is not known.
    """
    share = _share_of_f16(kv_type)
    return replace(llm, bytes_per_token=int(llm.bytes_per_token * share), row_bytes=int(llm.row_bytes * share))


def llm_named(name: str, kv_type: str = "f16") -> Llm:
    """A preset, or what a GGUF file says of itself, named as for `kvpsi pull`; of one on the hub only that is fetched.

    Raises:
        ModelFileError: there is no such model, or it does not say how large its cache is.
        UsageError: the type of the cache is not known.
    """
    if name.lower() in LLMS:
        return with_kv_type(LLMS[name.lower()], kv_type)
    if not name.strip():
        raise UsageError(f"A model has a name: {', '.join(LLMS)}, or as for `kvpsi pull`.")
    if not ("/" in name or name.endswith(".gguf") or name in ("default", *MODELS) or os.path.lexists(name)):
        raise ModelFileError(
            f"There is no model {name!r}: presets are {', '.join(LLMS)}; or name one as for `kvpsi pull`."
        )
    info = read_header(name)
    if info.is_recurrent:
        raise ModelFileError(f"{name} keeps a recurrent state instead of tokens in a cache; name another model.")
    if info.kv_elements_per_token is None or info.n_layer is None:
        raise ModelFileError(f"{name} does not say how large a token's keys and values are; name another model.")
    per_token = int(info.kv_elements_per_token * KV_BYTES["f16"])
    row_bytes = -(-per_token // (2 * info.n_layer))
    n_ctx_train = info.context_length or 131072
    llm = Llm(info.name or info.path.stem, info.size_bytes, per_token, row_bytes, n_ctx_train=n_ctx_train)
    return with_kv_type(llm, kv_type)


def _share_of_f16(kv_type: str) -> float:
    if kv_type not in KV_BYTES:
        raise UsageError(f"The types of a cache are {', '.join(KV_BYTES)}, not {kv_type!r}.")
    return KV_BYTES[kv_type] / KV_BYTES["f16"]
