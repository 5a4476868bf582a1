"""What a question attends to: its last queries are kept as it is read, and compared with all keys when that matters.

The queries outlive the question's own cells, and the scores tell which parts of a text an answer will need
(the idea of SnapKV, Li et al., 2024, https://arxiv.org/abs/2404.14469, for one sequence and all layers together).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import llama_cpp
import numpy as np
import numpy.typing as npt

from kvpsi.kv.cells import EMPTY, BoolArray, IntArray
from kvpsi.kv.keys import FloatArray32, Keys
from kvpsi.kv.tap import Node, Tap, ggml
from kvpsi.kv.ubatch import Tokens
from kvpsi.kv.vocabulary import Vocabulary

_N_QUERIES = 16
_LOOKED_AT_TOKENS = 32
_FIRST_LAYER, _LAST_LAYER = 1 / 3, 0.7  # as good as all of them, and a third of the work
_POOLED_CELLS = 7
_KEYS = re.compile(rb"cache_k_l(\d+)\b")
_F32 = 0
_LEAST_OPS = 90  # so many there are in any version, and asking for more of them is an error

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Question:
    """The queries of the end of a question.

    ``queries`` [layers, tokens, heads, values of a head] are those of ``layers``, as they are compared with the keys of
    the cache; ``last_pos`` is the position of the last of them.
    """

    layers: tuple[int, ...]
    queries: FloatArray32
    last_pos: int


class Questions:
    """The pending question of each sequence of a context that was made with `Questions.tap` in its parameters."""

    def __init__(self) -> None:
        self.tap = Tap(self._wanted, self._take)
        self._of: dict[int, Question] = {}
        self._scores: dict[int, Scores] = {}
        self._found: dict[int, FloatArray32] = {}
        self._columns: IntArray = np.empty(0, dtype=np.int32)
        self._layers: range = range(0)
        self._flash_op = self._product_op = -1
        self._vocabulary: Vocabulary | None = None

    def attach(self, ctx: llama_cpp.llama_context_p, vocabulary: Vocabulary) -> bool:
        """Find the tap in a new context; whether questions can be read there."""
        n_layers = int(llama_cpp.llama_model_n_layer(llama_cpp.llama_get_model(ctx)))
        self._layers = range(int(_FIRST_LAYER * n_layers), max(1, round(_LAST_LAYER * n_layers)))
        self._flash_op, self._product_op = _number_of_op(b"FLASH_ATTN_EXT"), _number_of_op(b"MUL_MAT")
        self._vocabulary = vocabulary
        self._of.clear()
        self._scores.clear()
        return self.tap.find(ctx)

    # -- reading -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def reading(self, tokens: Tokens, outputs: BoolArray) -> Iterator[None]:
        """Around the decode of a batch: if a question ends in it, its queries are kept.

        Args:
            tokens: the batch.
            outputs: which of its tokens' logits are wanted, shape [tokens].
        """
        asked = self._ends(tokens, outputs)
        if not asked:
            yield
            return
        self._columns = np.concatenate(list(asked.values()))
        self._found.clear()
        with self.tap.open():
            yield
        layers = tuple(layer for layer in self._layers if layer in self._found)
        if not layers:
            return
        queries = np.stack([self._found[layer] for layer in layers])
        at = 0
        for seq_id, columns in asked.items():
            mine = np.ascontiguousarray(queries[:, at : at + len(columns)])
            self._of[seq_id] = Question(layers, mine, int(tokens.pos[columns[-1]]))
            self._scores.pop(seq_id, None)
            at += len(columns)
        self._found.clear()

    def _ends(self, tokens: Tokens, outputs: BoolArray) -> dict[int, IntArray]:
        """The tokens that ask, for each sequence of which a prompt ends in a batch with a question."""
        found: dict[int, IntArray] = {}
        last_of = np.flatnonzero(outputs)
        for last in last_of.tolist():
            owners = tokens.seqs[last]
            mine = np.array([i for i in range(last + 1) if tokens.seqs[i] == owners], dtype=np.int32)
            if len(owners) != 1 or len(mine) == 1:
                continue
            asking = self._asking(tokens.token, mine[-_LOOKED_AT_TOKENS:])
            if asking.size:
                found[owners[0]] = asking
            elif len(mine) >= _LOOKED_AT_TOKENS or not self._follows(owners[0], int(tokens.pos[mine[0]])):
                self.forget(owners[0])
        return found

    def _follows(self, seq_id: int, pos: int) -> bool:
        """Whether a position comes soon after a question, such as what a chat template puts behind it."""
        question = self._of.get(seq_id)
        return question is not None and 0 < pos - question.last_pos <= _LOOKED_AT_TOKENS

    def _asking(self, token: IntArray, last: IntArray) -> IntArray:
        """Of the last tokens of a prompt those that ask: the end of the last turn before that which is to come, or what
        ends in a question."""
        assert self._vocabulary is not None
        turn = np.flatnonzero(self._vocabulary.ends_turn(token[last]))
        if turn.size and turn[-1]:
            return last[: turn[-1]][-_N_QUERIES:]
        if self._vocabulary.asks(token[last]).any():
            return last[-_N_QUERIES:]
        return last[:0]

    def _wanted(self, node: Node) -> bool:
        found = self._attention_of(node)
        return found is not None and found[0] in self._layers

    def _attention_of(self, node: Node) -> tuple[int, Node] | None:
        """Layer and queries of a node that compares queries with the keys of the cache, with flash attention or not."""
        if node.op == self._flash_op:
            queries, keys = node.src[0], node.src[1]
        elif node.op == self._product_op and node.name.startswith(b"kq-"):
            keys, queries = node.src[0], node.src[1]
        else:
            return None
        match = _KEYS.match(keys.contents.name) if keys and queries else None
        return (int(match[1]), queries.contents) if match else None

    def _take(self, node: Node) -> None:
        found = self._attention_of(node)
        if found is None:
            return
        layer, queries = found
        n_values, n_tokens, n_heads, n_streams = queries.ne  # the ubatch of a single stream, or all of them in one
        if queries.type != _F32 or n_streams != 1 or queries.nb[0] != 4 or int(self._columns.max()) >= n_tokens:
            return
        n_bytes = queries.nb[1] * (n_tokens - 1) + queries.nb[2] * (n_heads - 1) + 4 * n_values
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(queries.data)).view(np.float32)
        shape, strides = (n_tokens, n_heads, n_values), (queries.nb[1], queries.nb[2], 4)
        self._found[layer] = np.lib.stride_tricks.as_strided(memory, shape, strides)[self._columns]

    # -- what becomes of them ------------------------------------------------------------------------------------

    def forget(self, seq_id: int = -1, from_pos: int = 0) -> None:
        """A sequence has lost everything from a position on; -1: all of them."""
        for each in [seq_id] if seq_id >= 0 else list(self._of):
            if each in self._of and self._of[each].last_pos >= from_pos:
                del self._of[each]
                self._scores.pop(each, None)

    def of(self, seq_id: int) -> Question | None:
        """The pending one of a sequence, to be kept with its saved state."""
        return self._of.get(seq_id)

    def resume(self, seq_id: int, question: Question) -> None:
        """It is pending again, as its sequence was loaded."""
        self._of[seq_id] = question
        self._scores.pop(seq_id, None)

    # -- scores --------------------------------------------------------------------------------------------------

    @property
    def unscored(self) -> bool:
        """Whether there is a pending question whose scores are not complete."""
        return any(s not in self._scores or not self._scores[s].complete for s in self._of)

    def advance(self, keys: Keys, pos: IntArray, owner: BoolArray, sequences: Sequence[int], budget_s: float) -> None:
        """Go on with the scores of some sequences for about so long: whole heads of keys, one at least."""
        ends_s = time.perf_counter() + budget_s
        for seq_id, question in self._of.items():
            if seq_id not in sequences:
                continue
            if seq_id not in self._scores:
                held = owner[:, seq_id] & (pos != EMPTY) & (pos <= question.last_pos)
                self._scores[seq_id] = Scores(question, np.flatnonzero(held).astype(np.int32), pos)
            self._scores[seq_id].advance(keys, ends_s)
            if time.perf_counter() >= ends_s:
                return

    def attention(self, pos: IntArray, sequences: Sequence[int]) -> FloatArray | None:
        """How much the pending questions of some sequences attend to each cell; NaN where that is not known.

        None if no question is pending, or nothing is known yet. Shape [n_cells].
        """
        found: FloatArray | None = None
        for seq_id, scores in self._scores.items():
            if scores.n_done and seq_id in sequences:
                mine = scores.values(pos)
                found = mine if found is None else np.fmax(found, mine)
        return found


class Scores:
    """What one question attends to, computed head by head.

    Args:
        question: whose queries.
        cells: that it may attend to.
        pos: positions of all cells, now.
    """

    def __init__(self, question: Question, cells: IntArray, pos: IntArray) -> None:
        self._question = question
        self._cells = cells[np.argsort(pos[cells], kind="stable")]
        self._pos = pos[self._cells].copy()
        self._sum = np.zeros(len(cells), dtype=np.float64)
        self._n_heads: int | None = None
        self.n_done = 0

    @property
    def complete(self) -> bool:
        """Whether nothing is left to compute."""
        return self._n_heads is not None and self.n_done >= self._n_heads * len(self._question.layers)

    def advance(self, keys: Keys, ends_s: float) -> None:
        """Go on until that time (`time.perf_counter`), by one head of keys at least."""
        self._n_heads = keys.n_heads
        n_layers = len(self._question.layers)
        while not self.complete:
            # one head of every layer before the next, and the layers in leaps, so that few of them tell of all
            head, layer = divmod(self.n_done, n_layers)
            self._add(keys, layer * _leap(n_layers) % n_layers, head)
            if time.perf_counter() >= ends_s:
                return

    def _add(self, keys: Keys, index: int, head: int) -> None:
        queries = self._question.queries[index]
        group = queries.shape[1] // keys.n_heads
        mine = queries[:, head * group : (head + 1) * group].reshape(-1, queries.shape[2])
        logits = mine @ keys.layer(self._question.layers[index], self._cells, head).T
        logits *= np.float32(queries.shape[2] ** -0.5)
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=1, keepdims=True)
        self._sum += logits.mean(axis=0)
        self.n_done += 1

    def values(self, pos: IntArray) -> FloatArray:
        """The mean over what is computed, each cell with the largest of its neighbourhood; NaN where a cell now holds
        another position; shape [n_cells]."""
        half = _POOLED_CELLS // 2
        padded = np.pad(self._sum / max(1, self.n_done), half, mode="edge")
        pooled = np.lib.stride_tricks.sliding_window_view(padded, _POOLED_CELLS).max(axis=1)
        found = np.full(len(pos), np.nan)
        same = pos[self._cells] == self._pos
        found[self._cells[same]] = pooled[same]
        return found


def _leap(n: int) -> int:
    """A step by which all of n numbers are met, far from the last ones each time."""
    return next(step for step in range(max(1, round(0.618 * n)), n + 2) if math.gcd(step, n) == 1)


def _number_of_op(name: bytes) -> int:
    name_of = ggml().ggml_op_name
    name_of.argtypes, name_of.restype = [ctypes.c_int], ctypes.c_char_p
    return next((n for n in range(_LEAST_OPS) if name_of(n) == name), -1)
