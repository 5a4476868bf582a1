"""Has llama.cpp show what it computes, during single decodes and at no cost during all others.

llama.cpp asks the callback ``cb_eval`` at every node of a graph whether it is of interest. A Python function there is
slow, and which one it is can only be said when the context is made. So a C function is put there that always says no
(`ggml_is_empty`), and exchanged for a moment where the context keeps it: in its parameters (`llama_cparams`), which lie
at the beginning of the context itself and are recognised by the two pointers that were put there.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Callable, Iterator
from typing import Any

import llama_cpp

_LOOKED_AT_BYTES = 1024


def ggml() -> Any:
    """The library that computes for llama.cpp."""
    from llama_cpp._ggml import libggml  # not everywhere, and only where there is something to tap

    return libggml


class Node(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h, without what comes after its name."""


Node._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Node) * 10),
    ("view_src", ctypes.POINTER(Node)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


class Tap:
    """One for each context.

    ``wanted`` is asked for each node, ``taken`` is given those that are wanted once they are computed.
    """

    def __init__(self, wanted: Callable[[Node], bool], taken: Callable[[Node], None]) -> None:
        self._wanted, self._taken = wanted, taken
        self._idle = ctypes.cast(ggml().ggml_is_empty, llama_cpp.ggml_backend_sched_eval_callback)
        self._marker = ctypes.create_string_buffer(1)
        self._shows = False
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._see)
        self._place: ctypes.Array[ctypes.c_void_p] | None = None

    def put_into(self, params: llama_cpp.llama_context_params) -> None:
        """Have a context that is made with these parameters be one that can be tapped."""
        params.cb_eval = self._idle
        params.cb_eval_user_data = ctypes.addressof(self._marker)

    def find(self, ctx: llama_cpp.llama_context_p) -> bool:
        """Look for the place in a context that was made with those parameters; whether it is there."""
        head = ctypes.string_at(ctx, _LOOKED_AT_BYTES)
        pair = struct.pack("PP", ctypes.cast(self._idle, ctypes.c_void_p).value, ctypes.addressof(self._marker))
        if head.count(pair) == 1:
            start = ctypes.cast(ctx, ctypes.c_void_p).value or 0
            self._place = (ctypes.c_void_p * 2).from_address(start + head.index(pair))
        return self._place is not None

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """While it lasts, decodes show their nodes; a decode of the very same shape as the one before may not."""
        if self._place is None:
            yield
            return
        self._place[0] = ctypes.cast(self._callback, ctypes.c_void_p).value
        self._shows = True
        try:
            yield
        finally:
            self._shows = False
            self._place[0] = ctypes.cast(self._idle, ctypes.c_void_p).value

    def _see(self, address: int, ask: bool, _user_data: object) -> bool:
        # llama.cpp may ask once more after it was exchanged, as long as it uses the same graph again
        if not self._shows:
            return not ask
        node = Node.from_address(address)
        if ask:
            return self._wanted(node)
        self._taken(node)
        return True
