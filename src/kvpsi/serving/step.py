"""What the next decode holds: one token of every answer that is being written, and pieces of prompts beside them."""

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


T = TypeVar("T", bound=Reads)


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """The next ``n_tokens`` of a sequence; ``ends`` if they are all that is left."""

    sequence: T
    n_tokens: int
    ends: bool


def plan(sequences: Iterable[T], most_tokens: int, most_beside: int) -> list[Part[T]]:
    """What goes into one decode.

    Whoever writes gets its token every time. Prompts fill the rest, the first one first, but no more than
    ``most_beside`` tokens of them while somebody writes, so that nobody waits for a long prompt.

    Args:
        sequences: in the order in which they came.
        most_tokens: that one decode takes.
        most_beside: tokens of prompts beside answers.
    """
    waiting = [s for s in sequences if s.left > 0]
    parts = [Part(s, 1, True) for s in waiting if s.left == 1][:most_tokens]
    room = most_tokens - len(parts)
    if parts:
        room = min(room, most_beside)
    for sequence in waiting:
        if sequence.left > 1 and room > 0:
            n_tokens = min(sequence.left, room)
            parts.append(Part(sequence, n_tokens, n_tokens == sequence.left))
            room -= n_tokens
    return parts
