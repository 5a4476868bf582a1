"""Which cells llama.cpp really writes to, read from its own compute graph: nothing of kvpsi's is believed here."""

from __future__ import annotations

import ctypes
import re

import llama_cpp
import numpy as np

_TYPE_I64 = 27
_CACHE_KEYS = re.compile(rb"cache_k_l(\d+)")


class _Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.POINTER(_Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


class WrittenCells:
    """Collects, for each layer asked for, the cell indexes of every micro-batch.

    The second source of the node that stores a layer's keys (`ggml_set_rows`) holds them as int64, counted through all
    streams. Pass ``callback`` as ``cb_eval``.
    """

    def __init__(self, layers: tuple[int, ...] = (0,)) -> None:
        self.written: dict[int, list[list[int]]] = {layer: [] for layer in layers}
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._see)

    def _see(self, address: int, ask: bool, _user_data: object) -> bool:
        if ask:
            node = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
            match = _CACHE_KEYS.match(node.name)
            if match and int(match[1]) in self.written and node.src[1] and node.src[1].contents.type == _TYPE_I64:
                index = node.src[1].contents
                values = np.ctypeslib.as_array(ctypes.cast(index.data, ctypes.POINTER(ctypes.c_int64)), (index.ne[0],))
                self.written[int(match[1])].append(values.tolist())
        return not ask

    def take(self, layer: int) -> list[list[int]]:
        """What was collected for a layer since the last time."""
        found, self.written[layer] = self.written[layer], []
        return found
