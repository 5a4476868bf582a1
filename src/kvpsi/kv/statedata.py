"""Reads the bytes that llama.cpp's `llama_state_seq_get_data` writes: cells first, then K rows, then V rows.

The format is llama.cpp's own (`llama_kv_cache::state_write`), not documented, and may change between versions: a
state that is not consumed to its last byte is refused.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from mmap import mmap
from typing import Any, TypeAlias

import numpy as np

from kvpsi.errors import LayoutError

HEADER_BYTES = 8
StateBytes: TypeAlias = bytes | bytearray | memoryview | mmap
"""A saved state, also one that lies in a mapped file: it is looked at where it is."""

_EXT_BYTES = (0, 12)
_MAX_POS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TensorRows:
    """One layer's K or V of the saved cells.

    ``bytes_per_cell`` is the row size, or with ``n_rows`` > 1 (V transposed) the size of one element, of which
    there are ``n_rows`` rows. ``data`` holds [n_rows, cells, bytes_per_cell] in that order, where it lies in
    the state: it is not copied. ``ggml_type`` is ggml's number of the values' type.
    """

    bytes_per_cell: int
    n_rows: int
    data: memoryview
    ggml_type: int


@dataclass(frozen=True, slots=True)
class SectionState:
    """What one cache (a sliding-window model has two) saved for one sequence: positions and all layers' rows.

    All tuples are empty where it holds nothing of the sequence.
    """

    n_stream: int
    stream: int
    positions: tuple[int, ...]
    owners: tuple[tuple[int, ...], ...]
    v_transposed: bool
    keys: tuple[TensorRows, ...]
    values: tuple[TensorRows, ...]


class _Cursor:
    def __init__(self, data: StateBytes) -> None:
        self.data = memoryview(data)
        self.at = HEADER_BYTES

    def take(self, n: int) -> memoryview:
        if n < 0 or self.at + n > len(self.data):
            raise LayoutError("The saved state of the context ends in the middle of a field.")
        self.at += n
        return self.data[self.at - n : self.at]

    def u32(self) -> int:
        return int(struct.unpack("<I", self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack("<Q", self.take(8))[0])

    @property
    def left(self) -> int:
        return len(self.data) - self.at


def parse_cells(cursor: _Cursor, count: int, ext: int) -> tuple[list[int], list[tuple[int, ...]]]:
    """Positions and owning sequences of ``count`` cells; ``ext`` bytes of model-specific data are skipped."""
    positions: list[int] = []
    owners: list[tuple[int, ...]] = []
    for _ in range(count):
        positions.append(cursor.u32())
        if positions[-1] > _MAX_POS:
            raise LayoutError("The saved state of the context has a cell with a negative position.")
        n_seq = cursor.u32()
        if n_seq > 256:
            raise LayoutError("The saved state of the context names more sequences than llama.cpp allows.")
        cursor.take(ext)
        owners.append(struct.unpack(f"<{n_seq}i", cursor.take(4 * n_seq)))
    return positions, owners


def _parse_section(cursor: _Cursor, ext: int) -> SectionState:
    n_stream = cursor.u32()
    if not 1 <= n_stream <= 256:
        raise LayoutError("The saved state of the context does not begin with a number of streams.")
    found = SectionState(n_stream, 0, (), (), False, (), ())
    for stream in range(n_stream):
        count = cursor.u32()
        if count == 0:
            continue
        positions, owners = parse_cells(cursor, count, ext)
        v_transposed, n_layer = cursor.u32(), cursor.u32()
        if v_transposed > 1 or not 1 <= n_layer <= 4096:
            raise LayoutError("The saved state of the context has an unknown layer header.")
        keys = []
        for _ in range(n_layer):
            ggml_type = cursor.u32()
            row = cursor.u64()
            keys.append(TensorRows(row, 1, cursor.take(row * count), ggml_type))
        values = []
        for _ in range(n_layer if cursor.left else 0):
            ggml_type = cursor.u32()
            size, n_rows = (cursor.u32(), cursor.u32()) if v_transposed else (cursor.u64(), 1)
            values.append(TensorRows(size, n_rows, cursor.take(size * n_rows * count), ggml_type))
        found = SectionState(
            n_stream, stream, tuple(positions), tuple(owners), bool(v_transposed), tuple(keys), tuple(values)
        )
    return found


def parse_state(data: StateBytes) -> list[SectionState]:
    """The sections of a sequence's state, in the order of llama.cpp's caches; they look into ``data``.

    Raises:
        LayoutError: the bytes do not follow the known format.
    """
    problem = LayoutError("The saved state of the context is empty.")
    for ext in _EXT_BYTES:
        cursor = _Cursor(data)
        sections: list[SectionState] = []
        try:
            while cursor.left:
                sections.append(_parse_section(cursor, ext))
        except LayoutError as error:
            problem = error.with_traceback(None)  # its frames look into ``data``, which could not be closed
            continue
        if sections:
            return sections
    raise problem


def address_of(state: StateBytes) -> Any:
    """Where the bytes lie, for llama.cpp to read them; ``state`` must stay alive meanwhile."""
    return np.frombuffer(state, dtype=np.uint8).ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def sequence_from_whole(state: bytes, header: bytes) -> bytes:
    """The state of a context that holds one sequence, as `llama_state_get_data` wrote it, in a sequence's form.

    A whole context's state is the name of the architecture (u32 length, characters) and what its memory wrote; a
    sequence's state has ``header`` (magic and sequence id) in front instead.
    """
    if len(state) < 4:
        raise LayoutError("The saved state of the context is empty.")
    name_bytes = int(struct.unpack_from("<I", state)[0])
    if 4 + name_bytes > min(len(state), 256):
        raise LayoutError("The saved state of the context does not begin with the name of an architecture.")
    return header + state[4 + name_bytes :]
