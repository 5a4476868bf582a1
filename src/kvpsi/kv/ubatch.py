"""How llama.cpp cuts a batch into micro-batches (`llama_batch_allocr::split_simple` and `split_equal`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import llama_cpp
import numpy as np
import numpy.typing as npt

from kvpsi.kv.cells import UNKNOWN_TOKEN, IntArray

Index = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A batch as plain data: token ids, positions, owning sequences of each token, how many want logits."""

    token: IntArray
    pos: IntArray
    seqs: Sequence[Sequence[int]]
    n_outputs: int

    def __len__(self) -> int:
        return len(self.pos)


def read_batch(batch: llama_cpp.llama_batch, next_pos: int) -> Tokens:
    """The tokens of a `llama_batch`; without positions they continue sequence 0 at ``next_pos``."""
    n = batch.n_tokens
    if n == 1 and batch.token and batch.pos and batch.seq_id:
        # the common case, without the cost of making arrays out of pointers
        owners = [batch.seq_id[0][j] for j in range(batch.n_seq_id[0])]
        wanted = int(batch.logits[0] != 0) if batch.logits else 1
        only = np.array((batch.token[0], batch.pos[0]), dtype=np.int32)
        return Tokens(only[:1], only[1:], [owners], wanted)
    token = (
        np.ctypeslib.as_array(batch.token, (n,)).copy() if batch.token else np.full(n, UNKNOWN_TOKEN, dtype=np.int32)
    )
    if batch.pos:
        pos = np.ctypeslib.as_array(batch.pos, (n,)).copy()
    else:
        pos = np.arange(next_pos, next_pos + n, dtype=np.int32)
    if batch.seq_id and batch.n_seq_id:
        seqs: Sequence[Sequence[int]] = [[batch.seq_id[i][j] for j in range(batch.n_seq_id[i])] for i in range(n)]
    else:
        seqs = [(0,)] * n
    n_outputs = int(np.count_nonzero(np.ctypeslib.as_array(batch.logits, (n,)))) if batch.logits else 1
    return Tokens(token, pos, seqs, n_outputs)


def split_simple(tokens: Tokens, n_ubatch: int) -> list[list[Index]]:
    """Unified cells: runs of ``n_ubatch`` tokens; each micro-batch is one group."""
    return [[np.arange(i, min(i + n_ubatch, len(tokens)))] for i in range(0, len(tokens), n_ubatch)]


def split_equal(tokens: Tokens, n_ubatch: int, *, streams: bool) -> list[list[Index]]:
    """Equal numbers of tokens of several sequences in each micro-batch, one group for each sequence.

    With ``streams`` only sequences with ascending ids, one after the other, go together.
    """
    left: dict[frozenset[int], list[int]] = {}
    for i, seqs in enumerate(tokens.seqs):
        left.setdefault(frozenset(seqs), []).append(i)
    first = [next(iter(s)) for s in tokens.seqs]
    result: list[list[Index]] = []
    while any(left.values()):
        chosen: list[frozenset[int]] = []
        last = -1
        for i in sorted(i for indexes in left.values() for i in indexes):
            mine = frozenset(tokens.seqs[i])
            if any(mine & other for other in chosen):
                continue
            if streams and chosen and first[i] != last + 1:
                continue
            chosen.append(mine)
            last = first[i]
            if len(chosen) > n_ubatch:
                break
        shortest = min(len(left[s]) for s in chosen)
        count = min(shortest, max(1, n_ubatch // len(chosen)))
        groups = []
        for mine in chosen:
            groups.append(np.array(left[mine][:count], dtype=np.intp))
            left[mine] = left[mine][count:]
        result.append(groups)
    return result
