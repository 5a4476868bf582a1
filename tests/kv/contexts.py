"""Bare llama.cpp contexts for tests: one model, several contexts, low-level calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt


@contextlib.contextmanager
def open_model(path: Path) -> Iterator[llama_cpp.llama_model_p]:
    llama_cpp.llama_log_set(_SILENT, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    assert model is not None
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


@llama_cpp.llama_log_callback
def _SILENT(_level: int, _text: bytes, _data: object) -> None:  # noqa: N802
    pass


@dataclass(frozen=True)
class Shape:
    """What a test context looks like."""

    n_ctx: int = 512
    n_seq: int = 3
    unified: bool = True
    kv_type: int = llama_cpp.GGML_TYPE_F16
    flash: bool = True
    n_batch: int = 64
    n_ubatch: int = 32
    swa_full: bool = False


@contextlib.contextmanager
def open_context(
    model: llama_cpp.llama_model_p,
    shape: Shape,
    *,
    change: Callable[[llama_cpp.llama_context_params], None] = lambda _: None,
) -> Iterator[llama_cpp.llama_context_p]:
    """A context of that shape, with parameters that ``change`` may change."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = shape.n_ctx
    params.n_batch = shape.n_batch
    params.n_ubatch = shape.n_ubatch
    params.n_seq_max = shape.n_seq
    params.kv_unified = shape.unified
    params.type_k = params.type_v = shape.kv_type
    params.n_threads = params.n_threads_batch = 1
    params.swa_full = shape.swa_full
    params.flash_attn_type = (
        llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if shape.flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    change(params)
    ctx = llama_cpp.llama_init_from_model(model, params)
    assert ctx is not None
    try:
        yield ctx
    finally:
        llama_cpp.llama_free(ctx)


@contextlib.contextmanager
def batch_of(
    tokens: Sequence[tuple[int, int, int]], outputs: Sequence[int] | None = None
) -> Iterator[llama_cpp.llama_batch]:
    """A batch of (token, position, sequence) triples; ``outputs`` are the indexes that want logits (last one)."""
    wanted = {len(tokens) - 1} if outputs is None else set(outputs)
    batch = llama_cpp.llama_batch_init(max(1, len(tokens)), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, (token, pos, seq_id) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = pos
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = seq_id
            batch.logits[i] = i in wanted
        yield batch
    finally:
        llama_cpp.llama_batch_free(batch)


def logits(ctx: llama_cpp.llama_context_p, index: int = -1) -> npt.NDArray[np.float32]:
    """Logits of one output of the last decode, copied."""
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(ctx)))
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, index), (n_vocab,)).copy()
