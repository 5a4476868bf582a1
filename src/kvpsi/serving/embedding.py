"""Embeddings, in a context that is made for them and freed again: it costs milliseconds, and no memory afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp
import numpy as np
import numpy.typing as npt

from kvpsi.errors import EnvironmentProblem
from kvpsi.serving.batch import Batch
from kvpsi.serving.context import ServedContext

_PIECE_TOKENS = 512


def embed(context: ServedContext, text: Sequence[int]) -> npt.NDArray[np.float32]:
    """The embedding of a text, of length 1: what the model says of its pooling, or else the mean over its tokens.

    Args:
        context: called by the thread that owns it.
        text: token ids, at most as many as the context takes.

    Returns:
        an array of shape [n_embd].

    Raises:
        EnvironmentProblem: there is no memory for it.
    """
    inner = llama_cpp.llama_init_from_model(context.model.model, _params(context, len(text), _PIECE_TOKENS))
    if inner and llama_cpp.llama_pooling_type(inner) != llama_cpp.LLAMA_POOLING_TYPE_NONE:
        llama_cpp.llama_free(inner)  # pooling takes the whole text at once
        inner = llama_cpp.llama_init_from_model(context.model.model, _params(context, len(text), len(text)))
    if not inner:
        raise EnvironmentProblem(f"There is no memory for an embedding of {len(text)} tokens; send a shorter text.")
    try:
        return _of_length_1(_embedding(inner, text, context.model.n_embd()))
    finally:
        llama_cpp.llama_free(inner)


def _params(context: ServedContext, n_tokens: int, n_at_once: int) -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = n_tokens
    params.n_batch = params.n_ubatch = min(n_tokens, n_at_once)
    params.n_seq_max = 1
    params.embeddings = True
    params.n_threads = params.n_threads_batch = llama_cpp.llama_n_threads(context.ctx)
    params.no_perf = True
    return params


def _embedding(inner: llama_cpp.llama_context_p, text: Sequence[int], n_embd: int) -> npt.NDArray[np.float32]:
    n_at_once = int(llama_cpp.llama_n_batch(inner))
    total = np.zeros(n_embd, dtype=np.float32)
    batch = Batch(n_at_once)
    for start in range(0, len(text), n_at_once):
        piece = text[start : start + n_at_once]
        batch.clear()
        batch.add(0, start, piece, output=True)
        batch.want_all()
        code = llama_cpp.llama_decode(inner, batch.native)
        if code != 0:
            raise EnvironmentProblem(f"llama.cpp could not compute the embedding (llama_decode returned {code}).")
        if llama_cpp.llama_pooling_type(inner) != llama_cpp.LLAMA_POOLING_TYPE_NONE:
            pooled: npt.NDArray[np.float32] = np.ctypeslib.as_array(
                llama_cpp.llama_get_embeddings_seq(inner, 0), (n_embd,)
            ).copy()
            return pooled
        total += np.ctypeslib.as_array(llama_cpp.llama_get_embeddings(inner), (len(piece), n_embd)).sum(axis=0)
    return total


def _of_length_1(vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    length = float(np.linalg.norm(vector))
    scaled: npt.NDArray[np.float32] = (vector / length if length else vector).astype(np.float32)
    return scaled
