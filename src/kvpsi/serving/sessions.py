"""Conversations that nobody is answering just now: their tokens, and the state that llama.cpp saved of them.

They lie outside of the cache, so that those that are being answered do not have to attend to them, each in pages of its
own, which go back to the system at once when it is dropped, or in a file. The least recently used goes first.
"""

from __future__ import annotations

import itertools
import mmap
import time
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
        idle_since_s: CLOCK_MONOTONIC time since which nobody has been answering it.
        is_written: whether it is just being written to a file, so that its memory must stay.
        is_gone: whether nobody wants it any more.
    """

    tokens: list[int]
    state: mmap.mmap | None
    pin: str | None = None
    used: int = field(default=0)
    spilled: Spilled | None = None
    n_reads: int = 0
    idle_since_s: float = field(default_factory=time.monotonic)
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
    """All of them. Used by the engine's thread only, except for the attributes.

    Args:
        remove_file: has a file removed that is not wanted any more.

    Attributes:
        n_bytes: memory of all of them.
        loading_bytes: memory that is about to be taken for one that is being read from its file.
        n_parked, parked_bytes: how many are in a file only, and these files.
        dropped: how many were dropped for want of memory.
    """

    def __init__(self, remove_file: Callable[[Spilled], None] = lambda _: None) -> None:
        self.n_bytes = self.loading_bytes = 0
        self.n_parked = self.parked_bytes = 0
        self.dropped = 0
        self.remove_file = remove_file
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

    def best(self, prompt: Sequence[int], pin: str | None = None, *, in_memory: bool = False) -> Match | None:
        """The one that shares most first tokens with a prompt, of several the one with this pin or used last.

        ``in_memory`` leaves out those that are in a file only.
        """
        matches = [
            Match(s, n)
            for s in self._sessions
            if (s.state is not None or not in_memory) and (n := common_prefix(s.tokens, prompt))
        ]
        return max(matches, key=lambda m: (m.n_tokens, m.session.pin == pin, m.session.used), default=None)

    def note_use(self, session: Session) -> None:
        """Somebody goes on from it."""
        session.used = next(self._uses)

    def oldest(self, suits: Callable[[Session], bool] = lambda _: True) -> Session | None:
        """The one that was not used for longest, pinned ones last; None if none suits."""
        return min(filter(suits, self._sessions), key=lambda s: s.rank, default=None)

    def remove(self, session: Session) -> None:
        """Take one out; its memory goes back, as soon as nobody reads it any more."""
        self._sessions.remove(session)
        session.is_gone = True
        self._count_parked(session, -1)
        self._free(session)
        if session.spilled is not None:
            self.remove_file(session.spilled)

    def unload(self, session: Session) -> int:
        """Give its memory back, as it is in a file as well; the bytes."""
        n_bytes = self._free(session)
        self._count_parked(session, 1)
        return n_bytes

    def _count_parked(self, session: Session, times: int) -> None:
        if session.state is None:
            self.n_parked += times
            self.parked_bytes += times * (session.spilled.n_bytes if session.spilled else 0)

    def _free(self, session: Session) -> int:
        n_bytes, state = session.n_bytes, session.state
        self.n_bytes -= n_bytes
        session.state = None
        if state is not None and not session.is_written:
            state.close()
        return n_bytes

    def reload(self, session: Session, state: mmap.mmap) -> None:
        """Its state is in memory again."""
        self._count_parked(session, -1)
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
