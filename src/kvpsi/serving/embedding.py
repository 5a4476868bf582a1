"""Embeddings, in a context that is made for them and freed again: it costs milliseconds, and no memory afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp
import numpy as np
import numpy.typing as npt

from kvpsi.errors import EnvironmentProblem
from kvpsi.serving.batch import Batch
from kvpsi.serving.context import ServedContext


def embed(context: ServedContext, texts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
    """The embedding of each text, of length 1: what the model says of its pooling, or else the mean over its tokens.

    Args:
        context: called by the thread that owns it.
        texts: token ids, each at most as many as the context takes.

    Returns:
        an array of shape [texts, n_embd].

    Raises:
        EnvironmentProblem: there is no memory for it.
    """
    longest = max(map(len, texts))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = longest
    params.n_seq_max = 1
    params.embeddings = True
    params.n_threads = params.n_threads_batch = llama_cpp.llama_n_threads(context.ctx)
    params.no_perf = True
    inner = llama_cpp.llama_init_from_model(context.model.model, params)
    if not inner:
        raise EnvironmentProblem(f"There is no memory for embeddings of {longest} tokens; send shorter texts.")
    try:
        return np.stack([_embedding(inner, tokens, context.model.n_embd()) for tokens in texts])
    finally:
        llama_cpp.llama_free(inner)


def _embedding(inner: llama_cpp.llama_context_p, tokens: Sequence[int], n_embd: int) -> npt.NDArray[np.float32]:
    batch = Batch(len(tokens))
    batch.add(0, 0, tokens, output=True)
    batch.want_all()
    memory = llama_cpp.llama_get_memory(inner)
    if memory:  # a model that only embeds has none
        llama_cpp.llama_memory_clear(memory, False)
    code = llama_cpp.llama_decode(inner, batch.native)
    if code != 0:
        raise EnvironmentProblem(f"llama.cpp could not compute the embedding (llama_decode returned {code}).")
    if llama_cpp.llama_pooling_type(inner) == llama_cpp.LLAMA_POOLING_TYPE_NONE:
        each = np.ctypeslib.as_array(llama_cpp.llama_get_embeddings(inner), (len(tokens), n_embd))
        return _of_length_1(each.mean(axis=0))
    return _of_length_1(np.ctypeslib.as_array(llama_cpp.llama_get_embeddings_seq(inner, 0), (n_embd,)))


def _of_length_1(vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    length = float(np.linalg.norm(vector))
    scaled: npt.NDArray[np.float32] = (vector / length if length else vector).astype(np.float32)
    return scaled
