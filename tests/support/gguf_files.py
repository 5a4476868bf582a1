"""Writes small GGUF files, sound or broken."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

ALIGNMENT = 32
F32 = 0


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key_value(key: str, value: str | int | list[str] | list[int] | bytes) -> bytes:
    """``bytes`` are taken as they are: a type number and whatever follows it."""
    if isinstance(value, bytes):
        return text(key) + value
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    if isinstance(value, int):
        return text(key) + struct.pack("<II", 4, value)
    if value and isinstance(value[0], str):
        items = b"".join(text(str(item)) for item in value)
        return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + items
    numbers = b"".join(struct.pack("<I", item) for item in value)
    return text(key) + struct.pack("<IIQ", 9, 4, len(value)) + numbers


def tensor(name: str, dimensions: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    shape = b"".join(struct.pack("<Q", length) for length in dimensions)
    return text(name) + struct.pack("<I", len(dimensions)) + shape + struct.pack("<IQ", kind, offset)


DEFAULT_KEYS: Mapping[str, str | int | list[str] | list[int] | bytes] = {
    "general.architecture": "llama",
    "general.name": "tiny",
    "llama.context_length": 128,
    "llama.block_count": 2,
    "tokenizer.ggml.tokens": ["<s>", "a", "b"],
    "tokenizer.ggml.token_type": [1, 1, 1],
}


def gguf_bytes(
    keys: Mapping[str, str | int | list[str] | list[int] | bytes] = DEFAULT_KEYS,
    tensors: tuple[bytes, ...] = (tensor("weights", (8, 4)),),
    data_bytes: int = 128,
    version: int = 3,
) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    header += b"".join(key_value(key, value) for key, value in keys.items()) + b"".join(tensors)
    return header + bytes(-len(header) % ALIGNMENT) + bytes(data_bytes)


def write_gguf(path: Path, **changes: object) -> Path:
    path.write_bytes(gguf_bytes(**changes))  # type: ignore[arg-type]
    return path
