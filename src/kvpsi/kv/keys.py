"""The keys of a cache where they lie, as numbers that a policy can compare."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvpsi.kv.cells import IntArray
from kvpsi.kv.layout import Plane
from kvpsi.kv.tap import ggml

FloatArray32 = npt.NDArray[np.float32]
_F16 = 1
_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_float), ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """The beginning of `struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_values", ctypes.c_int64),
        ("interleaved_values", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _TO_FLOAT),
    )


class Keys:
    """Keys of one stream, one layer after the other; they change as tokens are decoded.

    Args:
        planes: where each layer's keys lie.
        ggml_type: what they are stored as.
        n_heads: key heads of a layer.
        n_cells: cells of the stream.
    """

    def __init__(self, planes: Sequence[Plane], ggml_type: int, n_heads: int, n_cells: int) -> None:
        self.n_layers = len(planes)
        self.n_heads = n_heads
        self._type = ggml_type
        self._rows = [rows_of(plane, n_cells) for plane in planes]

    def layer(self, index: int, cells: IntArray, head: int | None = None) -> FloatArray32:
        """A layer's keys of some cells, shape [cells, heads, values of a head]; of one head, [cells, values]."""
        rows = self._rows[index]
        if head is not None:
            n_bytes = rows.shape[1] // self.n_heads
            rows = rows[:, head * n_bytes : (head + 1) * n_bytes]
        chosen = np.ascontiguousarray(rows[cells])
        values = chosen.view(np.float16).astype(np.float32) if self._type == _F16 else self._converted(chosen)
        return values.reshape((len(cells), -1) if head is not None else (len(cells), self.n_heads, -1))

    def _converted(self, rows: npt.NDArray[np.uint8]) -> FloatArray32:
        traits = _traits(self._type)
        values = np.empty(rows.size // traits.block_bytes * traits.block_values, dtype=np.float32)
        traits.to_float(rows.ctypes.data, values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
        return values


def rows_of(plane: Plane, n_cells: int) -> npt.NDArray[np.uint8]:
    """The rows of a plane where they lie, for as long as the context lives; shape [cells, bytes of a row]."""
    where = ctypes.cast(plane.base, ctypes.POINTER(ctypes.c_uint8))
    return np.ctypeslib.as_array(where, (n_cells, plane.bytes_per_cell))


def _traits(ggml_type: int) -> _TypeTraits:
    find = ggml().ggml_get_type_traits
    find.argtypes, find.restype = [ctypes.c_int], ctypes.POINTER(_TypeTraits)
    found: _TypeTraits = find(ggml_type).contents
    return found
