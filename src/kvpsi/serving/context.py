"""A model with one context for many sequences, in a cache that gives memory back."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
from llama_cpp._internals import LlamaContext, LlamaModel

from kvpsi.engines.loading import KV_TYPES, LoadSettings, load_model, usable_threads
from kvpsi.errors import EnvironmentProblem
from kvpsi.instrument import Instrument
from kvpsi.kv import CacheSettings, ElasticCache

log = logging.getLogger("kvpsi")

_N_UBATCH = 512
_LONGEST_PIECE_BYTES = 256


class ServedContext:
    """What the engine works with; its thread is the only one to use it, except for `tokenize` and what never changes.

    Attributes:
        model: the weights and the vocabulary.
        ctx: llama.cpp's context.
        cache: through which every change to it goes.
        n_ctx: the most tokens of one conversation, prompt and answer.
        n_seq: sequences that there can be at once.
        n_batch: the most tokens of one decode.
    """

    def __init__(
        self,
        model: LlamaModel,
        context: LlamaContext,
        *,
        n_seq: int,
        settings: CacheSettings | None = None,
        instrument: Instrument | None = None,
    ) -> None:
        self.model = model
        self.ctx = context.ctx
        self.n_seq = n_seq
        self.n_batch = int(llama_cpp.llama_n_ubatch(self.ctx))
        self.n_vocab = model.n_vocab()
        self.cache = ElasticCache(self.ctx, settings=settings, instrument=instrument)
        self.n_ctx = min(self.cache.n_cells, model.n_ctx_train() or self.cache.n_cells)
        self._context = context
        self._pieces: dict[int, bytes] = {}

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a control token."""
        found = self._pieces.get(token)
        if found is None:
            buffer = ctypes.create_string_buffer(_LONGEST_PIECE_BYTES)
            n = llama_cpp.llama_token_to_piece(self.model.vocab, token, buffer, _LONGEST_PIECE_BYTES, 0, False)
            found = self._pieces[token] = buffer.raw[: max(0, n)]
        return found

    def token_text(self, token: int) -> str:
        """What a token is called in a template, also a control token; empty if there is no such token."""
        return str(self.model.token_get_text(token)) if token >= 0 else ""

    def ends_answer(self, token: int) -> bool:
        """Whether a token is the model's end of an answer."""
        return bool(llama_cpp.llama_vocab_is_eog(self.model.vocab, token))

    def close(self) -> None:
        """Free context and weights."""
        self.cache.close()
        self._context.close()
        self.model.close()


@contextlib.contextmanager
def open_context(
    path: Path,
    load: LoadSettings,
    *,
    n_cells: int,
    n_seq: int,
    settings: CacheSettings | None = None,
    instrument: Instrument | None = None,
    unified: bool = True,
) -> Iterator[ServedContext]:
    """Load a model with a context of ``n_cells`` for ``n_seq`` sequences, which share them all if they are ``unified``.

    Raises:
        ModelFileError: llama.cpp would not load the model.
        EnvironmentProblem: there is no memory for the context.
        LayoutError: its cache cannot give memory back.
    """
    model = load_model(path, load)
    try:
        context = LlamaContext(model=model, params=_context_params(load, n_cells, n_seq, unified), verbose=False)
    except ValueError as error:
        model.close()
        raise EnvironmentProblem(
            f"llama.cpp could not make a context of {n_cells} tokens ({error}); free memory, or use a smaller -c."
        ) from error
    try:
        served = ServedContext(model, context, n_seq=n_seq, settings=settings, instrument=instrument)
    except BaseException:
        context.close()
        model.close()
        raise
    try:
        yield served
    finally:
        served.close()


def _context_params(load: LoadSettings, n_cells: int, n_seq: int, unified: bool) -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    threads = load.n_threads or usable_threads()
    params.n_ctx = n_cells
    params.n_batch = params.n_ubatch = min(_N_UBATCH, n_cells)
    params.n_seq_max = n_seq
    params.kv_unified = unified
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k = params.type_v = KV_TYPES[load.kv_type]
    params.no_perf = True
    return params
