"""Conversations that nobody is answering just now: their tokens, and the state that llama.cpp saved of them.

They lie outside of the cache, so that those that are being answered do not have to attend to them, each in pages of its
own, which go back to the system at once when it is dropped. The least recently used goes first.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvpsi.serving.prefix import common_prefix


@dataclass(eq=False, slots=True)
class Session:
    """One conversation.

    Attributes:
        tokens: those whose keys and values ``state`` holds, from the first on without a gap.
        state: what `llama_state_seq_get_data` wrote, in anonymous memory of its own.
        pin: name that a client gave it; a pinned one goes after those that are not.
    """

    tokens: list[int]
    state: mmap.mmap
    pin: str | None = None
    used: int = field(default=0)

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        return len(self.state)


@dataclass(frozen=True, slots=True)
class Match:
    """A session of which the first ``n_tokens`` are those of a prompt."""

    session: Session
    n_tokens: int


class Sessions:
    """All of them. Used by the engine's thread only, except ``n_bytes``."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self.dropped = 0
        self._sessions: list[Session] = []
        self._uses = itertools.count(1)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions)

    def add(self, session: Session) -> None:
        """Keep one; one that it goes on from, or repeats, is dropped."""
        for other in [s for s in self._sessions if _goes_on_from(session.tokens, s.tokens)]:
            session.pin = session.pin or other.pin
            self.remove(other)
        session.used = next(self._uses)
        self._sessions.append(session)
        self.n_bytes += session.n_bytes

    def best(self, prompt: Sequence[int], pin: str | None = None) -> Match | None:
        """The one that shares most first tokens with a prompt, of several the one with this pin or used last."""
        matches = [Match(s, n) for s in self._sessions if (n := common_prefix(s.tokens, prompt))]
        if not matches:
            return None
        best = max(matches, key=lambda m: (m.n_tokens, m.session.pin == pin, m.session.used))
        best.session.used = next(self._uses)
        return best

    def remove(self, session: Session) -> None:
        """Take one out; its memory goes back."""
        self._sessions.remove(session)
        self.n_bytes -= session.n_bytes
        session.state.close()

    def drop_one(self, keeping: Session | None = None) -> int:
        """Drop the one that was not used for longest, pinned ones last; the bytes that went back, 0 without any.

        ``keeping`` stays.
        """
        oldest = min(
            (s for s in self._sessions if s is not keeping), key=lambda s: (s.pin is not None, s.used), default=None
        )
        if oldest is None:
            return 0
        n_bytes = oldest.n_bytes
        self.remove(oldest)
        self.dropped += 1
        return n_bytes

    def clear(self) -> None:
        """Drop all."""
        while self.drop_one():
            pass


def _goes_on_from(longer: Sequence[int], shorter: Sequence[int]) -> bool:
    return len(shorter) <= len(longer) and list(longer[: len(shorter)]) == list(shorter)
