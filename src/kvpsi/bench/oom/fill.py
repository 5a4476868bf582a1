"""The conversations that models begin with: read once, saved, and loaded by every run from a mapped file."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import llama_cpp

from kvpsi.bench.pressure.play import forget_cached_pages
from kvpsi.bench.worker import text_tokens
from kvpsi.engines.llama import GovernedLlama
from kvpsi.engines.loading import LoadSettings, open_llama
from kvpsi.errors import KvpsiError
from kvpsi.kv.layout import seq_state
from kvpsi.kv.statedata import address_of


def save(model: Path, n_tokens: int, file: Path) -> None:
    """Read so many tokens, and save the sequence."""
    with contextlib.closing(open_llama(model, n_tokens + 64, LoadSettings())) as llm:
        llm.eval(text_tokens(llm, n_tokens))
        file.write_bytes(seq_state(llm.ctx, 0))


def load(llm: llama_cpp.Llama, governed: GovernedLlama | None, n_tokens: int, file: Path) -> None:
    """Let a model hold a saved sequence.

    Raises:
        KvpsiError: llama.cpp would not take it.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as state:
        if governed is not None:
            loaded = governed.cache.load_sequence(state, 0)
        else:
            loaded = bool(llama_cpp.llama_state_seq_set_data(llm.ctx, address_of(state), len(state), 0))
    forget_cached_pages(file)  # or these pages, which nobody needs any more, would be the first to go
    if not loaded:
        raise KvpsiError("llama.cpp would not take the saved conversation.")
    tokens = text_tokens(llm, n_tokens)
    llm.input_ids[:n_tokens] = tokens
    llm.n_tokens = n_tokens
    llm.eval(tokens[-1:])
