"""What the next decode holds: one token of every answer that is being written, or pieces of prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Reads(Protocol):
    """A sequence of which tokens have yet to be decoded."""

    @property
    def left(self) -> int:
        """How many; after the last of them the next one is chosen."""
        ...

    @property
    def left_at_once(self) -> int:
        """How many of these may be in one decode."""
        ...


T = TypeVar("T", bound=Reads)
EVEN_PIECE_TOKENS = 64
"""From so many tokens in a decode on, llama.cpp computes attention in tiles, which rounds in another way than one by
one (``GGML_FA_TILE_Q``). Prompts are read in pieces of no less, so that it does not matter where they were cut."""


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """The next ``n_tokens`` of a sequence; ``ends`` if they are all that is left."""

    sequence: T
    n_tokens: int
    ends: bool


def plan(sequences: Iterable[T], most_tokens: int, most_beside: int, *, prompts_next: bool) -> list[Part[T]]:
    """What goes into one decode: the next token of every answer that is being written, or pieces of prompts.

    The two take turns and are never mixed: with 64 tokens or more in a decode llama.cpp computes the attention of each
    of them to every cell, also to those of others, which answers would pay for (docs/decisions/0008).

    Args:
        sequences: in the order in which they came; of the prompts, the first one goes first.
        most_tokens: that one decode takes.
        most_beside: tokens of prompts in a decode while somebody writes, so that nobody waits for a long prompt.
        prompts_next: whether it is the prompts' turn, if there are both.
    """
    waiting = [s for s in sequences if s.left > 0]
    writing = [s for s in waiting if s.left_at_once == 1]
    if writing and not (prompts_next and len(writing) < len(waiting)):
        return [Part(s, 1, s.left == 1) for s in writing[:most_tokens]]
    parts: list[Part[T]] = []
    room = min(most_tokens, most_beside) if writing else most_tokens
    for sequence in waiting:
        if sequence.left_at_once > 1 and room > 0:
            n_tokens = piece_of(sequence.left_at_once, room)
            parts.append(Part(sequence, n_tokens, n_tokens == sequence.left))
            room -= n_tokens
    return parts


def piece_of(left: int, room: int) -> int:
    """The next tokens of a prompt; where there is room, neither they nor what is left is too short."""
    if room < left < room + EVEN_PIECE_TOKENS and room >= 2 * EVEN_PIECE_TOKENS:
        return left - EVEN_PIECE_TOKENS
    return min(left, room)
