"""What tokens mean for forgetting: where sentences end, and whether a question is asked."""

from __future__ import annotations

import ctypes

import llama_cpp
import numpy as np

from kvpsi.kv.cells import BoolArray, IntArray

_LONGEST_PIECE_BYTES = 256
_ENDS = (b".", b"!", b"?", b";")


class Vocabulary:
    """Looks tokens up once; unknown ones (negative) mean nothing.

    Args:
        ctx: the context whose model's tokens they are.
    """

    def __init__(self, ctx: llama_cpp.llama_context_p) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(ctx))
        n_tokens = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self._looked_up = np.zeros(n_tokens, dtype=np.bool_)
        self._ends = np.zeros(n_tokens, dtype=np.bool_)
        self._asks = np.zeros(n_tokens, dtype=np.bool_)
        self._ends_turn = np.zeros(n_tokens, dtype=np.bool_)

    def ends_sentence(self, tokens: IntArray) -> BoolArray:
        """Which of them end a sentence or a line, or a turn of a conversation."""
        return self._of(self._ends, tokens)

    def asks(self, tokens: IntArray) -> BoolArray:
        """Which of them have a question mark."""
        return self._of(self._asks, tokens)

    def pieces(self, tokens: IntArray) -> list[bytes]:
        """The text of each, control tokens by their names; empty for unknown ones."""
        return [self._piece(token) if token >= 0 else b"" for token in tokens.tolist()]

    def ends_turn(self, tokens: IntArray) -> BoolArray:
        """Which of them end a turn of a conversation."""
        return self._of(self._ends_turn, tokens)

    def _of(self, table: BoolArray, tokens: IntArray) -> BoolArray:
        known = tokens >= 0
        for token in np.unique(tokens[known & ~self._looked_up[np.where(known, tokens, 0)]]).tolist():
            piece = self._piece(token)
            ends_turn = bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))
            self._ends_turn[token] = ends_turn
            self._ends[token] = piece.rstrip(b"\"' )").endswith(_ENDS) or b"\n" in piece or ends_turn
            self._asks[token] = b"?" in piece
            self._looked_up[token] = True
        found: BoolArray = table[np.where(known, tokens, 0)] & known
        return found

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(_LONGEST_PIECE_BYTES)
        n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, _LONGEST_PIECE_BYTES, 0, True)
        return buffer.raw[: max(0, n)]
