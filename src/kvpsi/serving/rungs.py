"""What a server can give beside unused pages, one class each; the engine's thread has them give.

The last one, forgetting, is that of every cache (`kvpsi.kv.forgetting`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvpsi.kv.forgetting import Forgetting
from kvpsi.ladder import Offer, Rung
from kvpsi.serving.answer import Answer
from kvpsi.serving.conversations import Conversations
from kvpsi.serving.parking import Parking
from kvpsi.serving.sessions import Session, Sessions

_PINNED = 100.0  # times that it counts to have a conversation again that somebody asked to keep
_WAITED_FOR = 10.0  # times that it counts to have one again for which somebody waits just now
_LEAST_WORTH_PAUSING = 256  # tokens; who holds fewer gives too little for the wait

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

    def give(self, n_bytes: int) -> int:  # noqa: ARG002 - a whole conversation at once
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

    def give(self, n_bytes: int) -> int:  # noqa: ARG002 - a whole conversation at once
        """Drop it."""
        session = self._next()
        return self._sessions.drop(session) if session else 0


class RestingConversation(Rung):
    """The conversation that rests in the cache: its cells go, and the model reads it again when it comes back."""

    name = "resting"

    def __init__(self, conversations: Conversations, bytes_per_cell: Callable[[], int]) -> None:
        self._conversations, self._bytes_per_cell = conversations, bytes_per_cell

    def offer(self) -> Offer | None:
        """All of it, at the cost of reading it again."""
        held = self._conversations.resting
        if held is None:
            return None
        n_tokens, weight = len(held.tokens), 1.0 if held.pin is None else _PINNED
        return Offer(n_tokens * self._bytes_per_cell(), weight * self._conversations.recompute_s(n_tokens))

    def give(self, n_bytes: int) -> int:  # noqa: ARG002 - a whole conversation at once
        """Give it up."""
        n_tokens = self._conversations.give_resting()
        return n_tokens * self._bytes_per_cell()


class PausedAnswer(Rung):
    """The answer that began last, as long as there is another: it waits before all others and goes on later where it
    was, from a file or after reading it again in the same way.

    Args:
        running: the answers, in the order in which they began.
        pause: pauses one; the bytes that its cells took.
        conversations: know what reading takes.
        bytes_per_cell: of the cache.
    """

    name = "paused"

    def __init__(
        self,
        running: Sequence[Answer],
        pause: Callable[[Answer], int],
        conversations: Conversations,
        bytes_per_cell: Callable[[], int],
    ) -> None:
        self._running, self._pause = running, pause
        self._conversations, self._bytes_per_cell = conversations, bytes_per_cell

    def offer(self) -> Offer | None:
        """What it holds, at the cost of reading it again while somebody waits."""
        if len(self._running) < 2:
            return None
        n_tokens = self._running[-1].n_done
        cost_s = _WAITED_FOR * self._conversations.recompute_s(max(n_tokens, _LEAST_WORTH_PAUSING))
        return Offer(max(1, n_tokens) * self._bytes_per_cell(), cost_s)

    def give(self, n_bytes: int) -> int:  # noqa: ARG002 - a whole answer at once
        """Pause it, and the one before it where that one held nothing for itself."""
        given = 0
        while not given and len(self._running) > 1:
            given = self._pause(self._running[-1])
        return given


LIVE: frozenset[str] = frozenset({RestingConversation.name, PausedAnswer.name, Forgetting.name})
"""What is in the cache: these are spared where something is only to be taken into it."""


def _weight(session: Session) -> float:
    return 1.0 if session.pin is None else _PINNED
