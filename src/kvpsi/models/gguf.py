"""Is this a GGUF file that llama.cpp can load, and what does its header say?

Only the header is read; no count in it is believed before it was compared with the bytes that are left, so a
damaged or hostile file costs at most about a second and no memory to speak of.
Source of the layout: ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from kvpsi.errors import ModelFileError

MemoryKind = Literal["attention", "recurrent", "hybrid"]
"""What the model remembers with: a KV cache, a recurrent state, or both."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MOST_KEYS, _MOST_TENSORS, _MOST_STRINGS = 1 << 14, 1 << 17, 1 << 22
_LONGEST_KEY = 1024
_LONGEST_KEPT_VALUE = 1024
_MOST_DIMENSIONS = 4
_LEAST_KEY_VALUE_BYTES = 8 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8

_TENSOR_TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110),
    22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8),
    29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip
"""ggml type → (elements per block, bytes per block); a type that is newer than this table is not sized."""

_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
_RECURRENT_KEYS = ("ssm.", "wkv.", "shortconv.", "kda.")


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """What the header of a sound GGUF file says; None where the file leaves it out.

    ``kv_elements_per_token`` are numbers that a token's keys and values have in all layers; a sliding window is not
    taken into account.
    """

    path: Path
    size_bytes: int
    version: int
    architecture: str
    name: str | None
    context_length: int | None
    n_layer: int | None
    sliding_window: int | None
    n_tensors: int
    memory: MemoryKind
    kv_elements_per_token: int | None = None

    @property
    def is_recurrent(self) -> bool:
        """Whether the model keeps a recurrent state, from which no single token can be removed."""
        return self.memory != "attention"


def check_gguf(path: str | os.PathLike[str]) -> GgufInfo:
    """Read and check the header of a model file; ModelFileError says what is wrong and what to do."""
    model_path = Path(path)
    try:
        status = model_path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelFileError(f"{model_path} is a directory: name the .gguf file inside it.")
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{model_path} is not a regular file: name a .gguf file.")
        with model_path.open("rb") as file:
            return _Header(file, model_path, status.st_size).read()
    except FileNotFoundError as error:
        raise ModelFileError(f"{model_path} does not exist: check the path, or run `kvpsi pull`.") from error
    except PermissionError as error:
        raise ModelFileError(f"{model_path} may not be read: change its permissions.") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ModelFileError(f"{str(model_path)!r} cannot be read ({why}): name a .gguf file.") from error


def read_gguf(file: BinaryIO, name: str, size_bytes: int) -> GgufInfo:
    """The header of an open file that need not be here in whole, such as one that is read over a network.

    Raises:
        ModelFileError: it is not sound.
        OSError: it cannot be read.
    """
    return _Header(file, Path(name), size_bytes).read(local=False)


class _Header:
    """One pass over the header of an open file."""

    def __init__(self, file: BinaryIO, path: Path, size_bytes: int) -> None:
        self._file = file
        self._path = path
        self._size_bytes = size_bytes
        self._strings_left = _MOST_STRINGS

    def read(self, *, local: bool = True) -> GgufInfo:
        if self._size_bytes == 0:
            raise ModelFileError(f"{self._path} is empty: download it again.")
        if self._file.read(4) != _MAGIC:
            raise ModelFileError(
                f"{self._path} is not a GGUF file: name a model in GGUF format, or convert it with llama.cpp."
            )
        version = int(self._number("I"))
        if version not in _VERSIONS:
            raise ModelFileError(
                f"{self._path} is GGUF version {version}, or of a machine with another byte order: "
                "use a version 2 or 3 file in little-endian order."
            )
        n_tensors = self._count(_LEAST_TENSOR_BYTES, _MOST_TENSORS)
        n_keys = self._count(_LEAST_KEY_VALUE_BYTES, _MOST_KEYS)
        metadata = self._metadata(n_keys)
        info = _info(self._path, self._size_bytes, version, n_tensors, metadata)
        self._check_tensors(n_tensors, _whole(metadata, "general.alignment") or 32)
        if local:
            _check_split(self._path, metadata)
        return info

    def _metadata(self, n_keys: int) -> dict[str, object]:
        metadata: dict[str, object] = {}
        for _ in range(n_keys):
            key = self._key()
            metadata[key] = self._value(int(self._number("I")))
        return metadata

    def _value(self, kind: int) -> object:
        """The value; None for an array or a long text, which is skipped."""
        if kind == _STRING:
            length = int(self._number("Q"))
            if length <= _LONGEST_KEPT_VALUE:
                return self._text(length)
            self._skip(length)
            return None
        if kind != _ARRAY:
            return self._number(self._scalar(kind))
        element = int(self._number("I"))
        if element == _STRING:
            self._skip_strings(self._count(8, self._strings_left))
        else:
            size = struct.calcsize(self._scalar(element))
            self._skip(self._count(size) * size)
        return None

    def _skip_strings(self, n_strings: int) -> None:
        """Hundreds of thousands of them (the vocabulary), so without a call for each."""
        self._strings_left -= n_strings
        file, length_of = self._file, struct.Struct("<Q").unpack
        position, left = file.tell(), self._left()
        for _ in range(n_strings):
            raw = file.read(8)
            step = 8 + length_of(raw)[0] if len(raw) == 8 else left + 1
            left -= step
            if left < 0:
                raise self._truncated(-left)
            position += step
            file.seek(position)

    def _check_tensors(self, n_tensors: int, alignment: int) -> None:
        if n_tensors == 0:
            raise ModelFileError(f"{self._path} holds no weights, only a header: use a complete model file.")
        if alignment & (alignment - 1):
            raise self._damaged(f"its alignment is {alignment}")
        data_end = 0
        for _ in range(n_tensors):
            self._key()
            n_dimensions = int(self._number("I"))
            if n_dimensions > _MOST_DIMENSIONS:
                raise self._damaged(f"a tensor has {n_dimensions} dimensions")
            n_elements = math.prod(int(self._number("Q")) for _ in range(n_dimensions))
            per_block, block_bytes = _TENSOR_TYPES.get(int(self._number("I")), (1, 0))
            data_end = max(data_end, int(self._number("Q")) + n_elements // per_block * block_bytes)
        header_end = -(-self._file.tell() // alignment) * alignment
        missing_bytes = header_end + data_end - self._size_bytes
        if missing_bytes > 0:
            raise self._truncated(missing_bytes)

    def _number(self, code: str) -> float:
        size = struct.calcsize("<" + code)
        raw = self._file.read(size)
        if len(raw) < size:
            raise self._truncated(size - len(raw))
        number: float = struct.unpack("<" + code, raw)[0]
        return number

    def _count(self, least_bytes: int, most: int | None = None) -> int:
        """A count of things of at least ``least_bytes`` each, which must fit into the rest of the file."""
        count = int(self._number("Q"))
        if count * least_bytes > self._left():
            raise self._truncated(count * least_bytes - self._left())
        if most is not None and count > most:
            raise self._damaged(f"it counts {count} entries where no model has more than {most}")
        return count

    def _key(self) -> str:
        length = int(self._number("Q"))
        if length > self._left():
            raise self._truncated(length - self._left())
        if length > _LONGEST_KEY:
            raise self._damaged(f"a name in it is {length} bytes long")
        return self._text(length)

    def _text(self, n_bytes: int) -> str:
        if n_bytes > self._left():
            raise self._truncated(n_bytes - self._left())
        return self._file.read(n_bytes).decode("utf-8", "replace")

    def _skip(self, n_bytes: int) -> None:
        if n_bytes > self._left():
            raise self._truncated(n_bytes - self._left())
        self._file.seek(n_bytes, os.SEEK_CUR)

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self._damaged(f"it uses the unknown value type {kind}")
        return _SCALARS[kind]

    def _left(self) -> int:
        return self._size_bytes - self._file.tell()

    def _truncated(self, missing_bytes: int) -> ModelFileError:
        return ModelFileError(
            f"{self._path} is cut off or damaged ({missing_bytes} bytes or more are missing): download it again."
        )

    def _damaged(self, why: str) -> ModelFileError:
        return ModelFileError(f"{self._path} is damaged ({why}): download it again.")


def _info(path: Path, size_bytes: int, version: int, n_tensors: int, metadata: Mapping[str, object]) -> GgufInfo:
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ModelFileError(f"{path} does not say which architecture it is: use a complete language model.")
    if architecture == "clip" or metadata.get("general.type") in ("adapter", "mmproj", "imatrix"):
        raise ModelFileError(f"{path} is an add-on ({architecture}), not a language model: name the model itself.")
    name = metadata.get("general.name")
    return GgufInfo(
        path=path,
        size_bytes=size_bytes,
        version=version,
        architecture=architecture,
        name=name if isinstance(name, str) else None,
        context_length=_whole(metadata, f"{architecture}.context_length"),
        n_layer=_whole(metadata, f"{architecture}.block_count"),
        sliding_window=_whole(metadata, f"{architecture}.attention.sliding_window"),
        n_tensors=n_tensors,
        memory=_memory_kind(architecture, metadata),
        kv_elements_per_token=_kv_elements(architecture, metadata),
    )


def _kv_elements(architecture: str, metadata: Mapping[str, object]) -> int | None:
    """Of one token: for each layer ``KV heads * (key length + value length)``, as llama.cpp reads these keys; None
    where they are missing, or are a list, as layers differ."""

    def whole(key: str) -> int | None:
        return _whole(metadata, f"{architecture}.{key}")

    n_layers, n_heads, n_embd = whole("block_count"), whole("attention.head_count"), whole("embedding_length")
    if n_layers is None or n_heads is None or n_embd is None:
        return None
    n_kv_heads = whole("attention.head_count_kv")
    if n_kv_heads is None and f"{architecture}.attention.head_count_kv" not in metadata:
        n_kv_heads = n_heads
    if n_kv_heads is None:
        return None
    key_length = whole("attention.key_length") or n_embd // n_heads
    value_length = whole("attention.value_length") or n_embd // n_heads
    return n_layers * n_kv_heads * (key_length + value_length)


def _memory_kind(architecture: str, metadata: Mapping[str, object]) -> MemoryKind:
    if architecture in _RECURRENT:
        return "recurrent"
    prefixes = tuple(f"{architecture}.{key}" for key in _RECURRENT_KEYS)
    return "hybrid" if any(key.startswith(prefixes) for key in metadata) else "attention"


def _check_split(path: Path, metadata: Mapping[str, object]) -> None:
    """A model in several files is loaded by its first; the others must lie beside it."""
    n_files = _whole(metadata, "split.count") or 1
    if n_files <= 1:
        return
    stem, separator, _ = path.name.rpartition(f"-00001-of-{n_files:05}.gguf")
    if not separator:
        raise ModelFileError(
            f"{path} is one part of a split model: name its first part (…-00001-of-{n_files:05}.gguf)."
        )
    for number in range(2, n_files + 1):
        part = path.with_name(f"{stem}-{number:05}-of-{n_files:05}.gguf")
        if not part.is_file():
            raise ModelFileError(f"{part} is missing: put all {n_files} parts of the model into one folder.")


def _whole(metadata: Mapping[str, object], key: str) -> int | None:
    value = metadata.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
