"""What a server can give beside unused pages, one class each; the engine's thread has them give.

What comes after these costs somebody something that he notices: pausing an answer, and forgetting. They are the
engine's and the cache's own to choose.
"""

from __future__ import annotations

from collections.abc import Callable

from kvpsi.governor.ladder import Offer, Rung
from kvpsi.serving.conversations import Conversations
from kvpsi.serving.parking import Parking
from kvpsi.serving.sessions import Session, Sessions

_PINNED = 100.0  # times that it counts to have a conversation again that somebody asked to keep

Spared = Callable[[Session], bool]
"""Whether a conversation is in use just now, so that it must stay."""


class ParkedConversations(Rung):
    """Conversations that lie in a file as well: their memory goes, the file is read when they come back."""

    name = "parked"

    def __init__(self, sessions: Sessions, parking: Parking, spared: Spared) -> None:
        self._sessions, self._parking, self._spared = sessions, parking, spared

    def _next(self) -> Session | None:
        return self._sessions.oldest(lambda s: s.state is not None and s.spilled is not None and not self._spared(s))

    def offer(self) -> Offer | None:
        """The one that was not used for longest, at the cost of reading its file."""
        session = self._next()
        return Offer(session.n_bytes, _weight(session) * self._parking.read_s(session.n_bytes)) if session else None

    def give(self) -> int:
        """Give its memory back."""
        session = self._next()
        return self._sessions.unload(session) if session else 0


class SavedConversations(Rung):
    """Conversations that lie in memory only: they are dropped, and read again by the model when they come back."""

    name = "dropped"

    def __init__(self, sessions: Sessions, conversations: Conversations, spared: Spared) -> None:
        self._sessions, self._conversations, self._spared = sessions, conversations, spared

    def _next(self) -> Session | None:
        def may_go(session: Session) -> bool:
            return session.state is not None and session.spilled is None and not self._spared(session)

        # one that is being written goes as soon as it is, and not before
        return self._sessions.oldest(lambda s: may_go(s) and not s.is_written) or self._sessions.oldest(may_go)

    def offer(self) -> Offer | None:
        """The one that was not used for longest, at the cost of having the model read it again."""
        session = self._next()
        if session is None:
            return None
        return Offer(session.n_bytes, _weight(session) * self._conversations.recompute_s(len(session.tokens)))

    def give(self) -> int:
        """Drop it."""
        session = self._next()
        return self._sessions.drop(session) if session else 0


def _weight(session: Session) -> float:
    return 1.0 if session.pin is None else _PINNED
