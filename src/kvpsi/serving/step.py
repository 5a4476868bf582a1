"""What the next decode holds: one token of every answer that is being written, or pieces of prompts."""

from __future__ import annotations

import enum
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

    @property
    def read_at(self) -> int:
        """Number of the decode in which it was last read, or of the last one before it began."""
        ...


T = TypeVar("T", bound=Reads)
EVEN_PIECE_TOKENS = 64
"""From so many tokens in a decode on, llama.cpp computes attention in tiles, which rounds in another way than one by
one (``GGML_FA_TILE_Q``). Prompts are read in pieces of no less, so that it does not matter where they were cut."""

_LONG_TOKENS = 2 * EVEN_PIECE_TOKENS


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """The next ``n_tokens`` of a sequence; ``ends`` if they are all that is left."""

    sequence: T
    n_tokens: int
    ends: bool


class Turn(enum.Enum):
    """Whose it is while some write and others read: answers, also short prompts, or all prompts."""

    ANSWERS = enum.auto()
    SHORT_PROMPTS = enum.auto()
    PROMPTS = enum.auto()


def plan(sequences: Iterable[T], most_tokens: int, most_beside: int, turn: Turn) -> list[Part[T]]:
    """What goes into one decode: the next token of every answer that is being written, or pieces of prompts.

    The two take turns and are never mixed: with 64 tokens or more in a decode llama.cpp computes the attention of each
    of them to every cell, also to those of others, which answers would pay for (docs/decisions/0008).

    Args:
        sequences: of the prompts, the one that was read longest ago goes first.
        most_tokens: that one decode takes.
        most_beside: tokens of prompts in a decode while somebody writes, so that nobody waits for a long prompt; a
            prompt of less than two even pieces is read whole.
        turn: whose it is, if there are both.
    """
    waiting = [s for s in sequences if s.left > 0]
    writing = [s for s in waiting if s.left_at_once == 1]
    reading = sorted((s for s in waiting if s.left_at_once > 1), key=lambda s: s.read_at)
    if writing:
        if turn is Turn.SHORT_PROMPTS:
            reading = [s for s in reading if not is_long_prompt(s)]
        if turn is Turn.ANSWERS or not reading:
            return [Part(s, 1, s.left == 1) for s in writing[:most_tokens]]
    parts: list[Part[T]] = []
    room = min(most_tokens, most_beside) if writing else most_tokens
    for sequence in reading:
        n_tokens = piece_of(sequence.left_at_once, room, most_tokens - sum(p.n_tokens for p in parts))
        if n_tokens <= 0 or (parts and n_tokens < min(sequence.left_at_once, EVEN_PIECE_TOKENS)):
            break
        parts.append(Part(sequence, n_tokens, n_tokens == sequence.left))
        room -= n_tokens
    return parts


def is_long_prompt(sequence: Reads) -> bool:
    """Whether so much is left to read that it is done in several pieces."""
    return sequence.left_at_once >= _LONG_TOKENS


def piece_of(left: int, room: int, most: int) -> int:
    """The next tokens of a prompt; where there is room, or ``most`` allows it, neither they nor what is left is few."""
    if room <= 0 or left <= room:
        return min(left, room)
    if left < _LONG_TOKENS and left <= most:
        return left
    if left < room + EVEN_PIECE_TOKENS and room >= _LONG_TOKENS:
        return left - EVEN_PIECE_TOKENS
    return room
