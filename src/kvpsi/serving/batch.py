"""A `llama_batch` over arrays of its own, filled without a Python call for each token."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import llama_cpp
import numpy as np


class Batch:
    """Tokens of several sequences.

    Args:
        most_tokens: how many it can take.
    """

    def __init__(self, most_tokens: int) -> None:
        self._token = np.zeros(most_tokens, dtype=np.int32)
        self._pos = np.zeros(most_tokens, dtype=np.int32)
        self._owner = np.zeros(most_tokens, dtype=np.int32)
        self._n_owners = np.ones(most_tokens, dtype=np.int32)
        self._owners = self._owner.ctypes.data + np.arange(most_tokens, dtype=np.uintp) * self._owner.itemsize
        self._wanted = np.zeros(most_tokens, dtype=np.int8)
        self.native = llama_cpp.llama_batch()
        for name, array in (
            ("token", self._token),
            ("pos", self._pos),
            ("n_seq_id", self._n_owners),
            ("seq_id", self._owners),
            ("logits", self._wanted),
        ):
            kind = dict(llama_cpp.llama_batch._fields_)[name]
            setattr(self.native, name, ctypes.cast(array.ctypes.data, kind))
        self.native.n_tokens = 0

    def __len__(self) -> int:
        return int(self.native.n_tokens)

    def clear(self) -> None:
        """Empty it."""
        self.native.n_tokens = 0

    def want_all(self) -> None:
        """Ask for the output of every token."""
        self._wanted[: len(self)] = 1

    def add(self, seq_id: int, first_pos: int, tokens: Sequence[int], *, output: bool) -> int:
        """Add tokens of a sequence, from a position on.

        Returns:
            the index of the last one, by which its logits are found if ``output`` asks for them.
        """
        start = len(self)
        end = start + len(tokens)
        self._token[start:end] = tokens
        self._pos[start:end] = np.arange(first_pos, first_pos + len(tokens))
        self._owner[start:end] = seq_id
        self._wanted[start:end] = 0
        self._wanted[end - 1] = output
        self.native.n_tokens = end
        return end - 1
