"""Conversations that nobody is answering just now: their tokens, and the state that llama.cpp saved of them.

They lie outside of the cache, so that those that are being answered do not have to attend to them, each in pages of its
own, which go back to the system at once when it is dropped, or in a file. The least recently used goes first.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvpsi.kv.spill import Spilled
from kvpsi.serving.prefix import common_prefix


@dataclass(eq=False, slots=True)
class Session:
    """One conversation.

    Attributes:
        tokens: those whose keys and values the state holds, from the first on without a gap.
        state: what `llama_state_seq_get_data` wrote, in anonymous memory of its own; None if it is in a file only.
        pin: name that a client gave it; a pinned one goes after those that are not.
        used: when, as a number that grows.
        spilled: the state in a file, if it was written to one.
        n_reads: how often the file was read without that it could be loaded.
        is_written: whether it is just being written to a file, so that its memory must stay.
        is_gone: whether nobody wants it any more.
    """

    tokens: list[int]
    state: mmap.mmap | None
    pin: str | None = None
    used: int = field(default=0)
    spilled: Spilled | None = None
    n_reads: int = 0
    is_written: bool = False
    is_gone: bool = False

    @property
    def rank(self) -> tuple[bool, int]:
        """Of two the one with the lower one goes first."""
        return self.pin is not None, self.used

    @property
    def n_bytes(self) -> int:
        """Memory that it takes."""
        return 0 if self.state is None else len(self.state)


@dataclass(frozen=True, slots=True)
class Match:
    """A session of which the first ``n_tokens`` are those of a prompt."""

    session: Session
    n_tokens: int


class Sessions:
    """All of them. Used by the engine's thread only, except ``n_bytes``.

    Args:
        remove_file: has a file removed that is not wanted any more.
    """

    def __init__(self, remove_file: Callable[[Spilled], None] = lambda _: None) -> None:
        self.n_bytes = 0
        self.dropped = 0
        self.remove_file = remove_file
        self._sessions: list[Session] = []
        self._uses = itertools.count(1)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions)

    @property
    def n_parked(self) -> int:
        """How many are in a file only."""
        return sum(s.state is None for s in self._sessions)

    @property
    def parked_bytes(self) -> int:
        """Files of those that are in a file only."""
        return sum(s.spilled.n_bytes for s in self._sessions if s.state is None and s.spilled is not None)

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

    def oldest(self, suits: Callable[[Session], bool] = lambda _: True) -> Session | None:
        """The one that was not used for longest, pinned ones last; None if none suits."""
        return min(filter(suits, self._sessions), key=lambda s: s.rank, default=None)

    def remove(self, session: Session) -> None:
        """Take one out; its memory goes back, as soon as nobody reads it any more."""
        self._sessions.remove(session)
        session.is_gone = True
        self.unload(session)
        if session.spilled is not None:
            self.remove_file(session.spilled)

    def unload(self, session: Session) -> int:
        """Give its memory back; the bytes."""
        n_bytes, state = session.n_bytes, session.state
        self.n_bytes -= n_bytes
        session.state = None
        if state is not None and not session.is_written:
            state.close()
        return n_bytes

    def reload(self, session: Session, state: mmap.mmap) -> None:
        """Its state is in memory again."""
        session.state = state
        self.n_bytes += session.n_bytes

    def drop(self, session: Session) -> int:
        """Drop one for want of memory; the bytes that went back."""
        n_bytes = session.n_bytes
        self.remove(session)
        self.dropped += 1
        return n_bytes

    def clear(self) -> None:
        """Drop all."""
        while (oldest := self.oldest()) is not None:
            self.drop(oldest)


def _goes_on_from(longer: Sequence[int], shorter: Sequence[int]) -> bool:
    return len(shorter) <= len(longer) and list(longer[: len(shorter)]) == list(shorter)
