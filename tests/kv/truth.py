"""Which cells llama.cpp really writes to, read from its own compute graph: nothing of kvpsi's is believed here."""

from __future__ import annotations

import ctypes
import re

import llama_cpp
import numpy as np

from kvpsi.kv.tap import Node

_TYPE_I64 = 27
_CACHE_KEYS = re.compile(rb"cache_k_l(\d+)")


class WrittenCells:
    """Collects, for each layer asked for, the cell indexes of every micro-batch.

    The second source of the node that stores a layer's keys (`ggml_set_rows`) holds them as int64, counted through all
    streams.
    """

    def __init__(self, layers: tuple[int, ...] = (0,)) -> None:
        self.written: dict[int, list[list[int]]] = {layer: [] for layer in layers}
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._see)

    def put_into(self, params: llama_cpp.llama_context_params) -> None:
        """Have a context that is made with these parameters show its nodes; this object must live as long."""
        params.cb_eval = self._callback

    def _see(self, address: int, ask: bool, _user_data: object) -> bool:
        if ask:
            node = ctypes.cast(address, ctypes.POINTER(Node)).contents
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
