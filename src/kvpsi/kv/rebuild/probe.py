"""What has to be known of a context before it is rebuilt: what a cell costs, and how small it may become."""

from __future__ import annotations

import ctypes

import llama_cpp

from kvpsi.errors import LayoutError
from kvpsi.kv.gated import DECODE_OK
from kvpsi.kv.rebuild.context import ONLY_SEQUENCE
from kvpsi.kv.rebuild.sizes import round_up


def measure_cell(ctx: llama_cpp.llama_context_p) -> int:
    """Bytes that one more token adds to the state of an *empty* context; it is empty again afterwards.

    Raises:
        LayoutError: it would not decode a probe, or its state cannot be carried over.
    """
    memory = llama_cpp.llama_get_memory(ctx)
    vocab = llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(ctx))
    token = (llama_cpp.llama_token * 1)(llama_cpp.llama_vocab_n_tokens(vocab) // 2)
    sizes = []
    llama_cpp.llama_memory_clear(memory, False)
    try:
        for _ in range(2):
            code = int(llama_cpp.llama_decode(ctx, llama_cpp.llama_batch_get_one(token, 1)))
            if code != DECODE_OK:
                raise LayoutError(f"The context would not decode a probe token (llama_decode returned {code}).")
            sizes.append(int(llama_cpp.llama_state_seq_get_size(ctx, ONLY_SEQUENCE)))
    finally:
        llama_cpp.llama_memory_clear(memory, False)
    if sizes[1] <= sizes[0]:
        raise LayoutError("The context's saved state does not grow with its tokens, so it cannot be carried over.")
    return sizes[1] - sizes[0]


def least_cells(model: llama_cpp.llama_model_p, n_cells: int) -> int:
    """Cells below which a context of ``n_cells`` would compute positions differently, 0 if there is no such size.

    llama.cpp chooses between the short and the long frequency factors of a LongRoPE model by the size of the context
    (`llama_model::get_rope_factors`); keys of one kind are of no use to the other.
    """
    arch = _metadata(model, "general.architecture")
    trained = _metadata(model, f"{arch}.rope.scaling.original_context_length")
    by_size = _metadata(model, f"{arch}.rope.scaling.type") not in ("linear", "yarn")
    if trained.isdigit() and by_size and n_cells > int(trained):
        return round_up(int(trained) + 1)
    return 0


def _metadata(model: llama_cpp.llama_model_p, key: str) -> str:
    buffer = ctypes.create_string_buffer(256)
    length = int(llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer)))
    return buffer.value.decode("utf-8", "replace") if length >= 0 else ""
