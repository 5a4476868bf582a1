"""Conversations that models of a bench begin with: read once, saved, and loaded by every process from a mapped file."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np

from kvpsi.engines.llama import GovernedLlama
from kvpsi.engines.loading import LoadSettings, open_llama
from kvpsi.errors import EnvironmentProblem, KvpsiError
from kvpsi.kv.layout import seq_state
from kvpsi.kv.statedata import address_of
from kvpsi.units import format_bytes


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a model holds at first: ``n_tokens`` of a context of ``n_ctx``, saved in ``state``."""

    n_ctx: int
    n_tokens: int
    state: Path

    def as_argument(self, model: Path) -> str:
        """What a model's process is told of it, for `Told.of`."""
        return json.dumps(
            {"model": str(model), "n_ctx": self.n_ctx, "n_tokens": self.n_tokens, "state": str(self.state)}
        )


@dataclass(frozen=True, slots=True)
class Told:
    """What a model's process was told: which model, and what it holds at first."""

    model: Path
    conversation: Conversation

    @classmethod
    def of(cls, argument: str) -> Told:
        """From `Conversation.as_argument`."""
        said = json.loads(argument)
        return cls(Path(said["model"]), Conversation(said["n_ctx"], said["n_tokens"], Path(said["state"])))


def text_tokens(llm: llama_cpp.Llama, count: int) -> list[int]:
    """Ordinary token ids, the same for every model of one vocabulary."""
    n_vocab = llm.n_vocab()
    return [int(t) for t in np.random.default_rng(7).integers(n_vocab // 4, n_vocab // 2, count)]


@contextlib.contextmanager
def saved(model: Path, n_ctx: int, n_tokens: int) -> Iterator[Conversation]:
    """Read so many tokens, and save them in a file without a name: it is gone with this process, however that ends.

    Raises:
        EnvironmentProblem: there is no room for it.
    """
    with tempfile.TemporaryFile() as file:
        conversation = Conversation(n_ctx, n_tokens, Path(f"/proc/{os.getpid()}/fd/{file.fileno()}"))
        with contextlib.closing(open_llama(model, n_tokens + 64, LoadSettings())) as llm:
            llm.eval(text_tokens(llm, n_tokens))
            state = seq_state(llm.ctx, 0)
        try:
            file.write(state)
            file.flush()
            os.fsync(file.fileno())  # only clean pages can be dropped
        except OSError as error:
            raise EnvironmentProblem(
                f"A conversation of {format_bytes(len(state))} cannot be saved in {tempfile.gettempdir()} "
                f"({error.strerror}): free some space there, or let TMPDIR name another folder."
            ) from error
        yield conversation


def load(llm: llama_cpp.Llama, governed: GovernedLlama | None, conversation: Conversation) -> None:
    """Let a model hold a saved conversation.

    Raises:
        KvpsiError: llama.cpp would not take it.
    """
    n_tokens = conversation.n_tokens
    with conversation.state.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as state:
        if governed is not None:
            loaded = governed.cache.load_sequence(state, 0)
        else:
            loaded = bool(llama_cpp.llama_state_seq_set_data(llm.ctx, address_of(state), len(state), 0))
    forget_cached_pages(conversation.state)  # or these pages, which nobody needs any more, would be the first to go
    if not loaded:
        raise KvpsiError("llama.cpp would not take the saved conversation.")
    tokens = text_tokens(llm, n_tokens)
    llm.input_ids[:n_tokens] = tokens
    llm.n_tokens = n_tokens
    llm.eval(tokens[-1:])


def forget_cached_pages(file: Path) -> None:
    """Drop a file from the page cache, so that whoever reads it next is charged for it."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
