"""What was forgotten is read again while nobody is being answered, so that the next turn knows all of it at once."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvpsi.errors import CacheRefusedError
from kvpsi.kv.gated import DECODE_ABORTED, DECODE_OK
from kvpsi.serving.batch import Batch
from kvpsi.serving.context import ServedContext
from kvpsi.serving.conversations import Conversations, Held
from kvpsi.serving.memory import CacheMemory
from kvpsi.serving.step import piece_of


class Healing:
    """A piece at a time, so that nobody waits for long. Used by the engine's thread.

    Args:
        context: in whose cache it is read.
        conversations: of which one rests there.
        memory: knows whether there is room.
        most_tokens: of a piece.
        is_tight: whether memory may soon be too little, so that it would go again.
        is_on: whether anything is healed at all.

    Attributes:
        tokens, seconds: that were read again, and how long that took.
    """

    def __init__(
        self,
        context: ServedContext,
        conversations: Conversations,
        memory: CacheMemory,
        *,
        most_tokens: int,
        is_tight: Callable[[], bool],
        is_on: bool,
    ) -> None:
        self._context, self._conversations, self._memory = context, conversations, memory
        self._most_tokens, self._is_tight, self._is_on = most_tokens, is_tight, is_on
        self._batch = Batch(context.n_batch)
        self.tokens = 0
        self.seconds = 0.0

    @property
    def may_come(self) -> bool:
        """Whether there is something to heal as soon as there is room."""
        resting = self._conversations.resting
        return self._is_on and resting is not None and bool(resting.lost)

    @property
    def is_due(self) -> bool:
        """Whether there is room for all of it now."""
        resting = self._conversations.resting
        if not self.may_come or resting is None or not self._context.cache.trusted:
            return False
        return not self._memory.missing_cells(len(resting.lost)) and not self._is_tight()

    def go_on(self) -> None:
        """Read the next piece. An error ends the healing; the conversation's next turn reads what is left."""
        held = self._conversations.resting
        if held is None:
            return
        try:
            self._read(held)
        except BaseException:
            held.lost.clear()
            raise

    def _read(self, held: Held) -> None:
        cache = self._context.cache
        most = min(self._context.n_batch, cache.most_at_once())
        piece = held.lost[: piece_of(len(held.lost), min(self._most_tokens, most), most)]
        began = time.monotonic()
        self._batch.clear()
        self._batch.add(held.seq_id, len(held.tokens), piece, output=False)
        try:
            code = cache.decode(self._batch.native, return_when_stopped=True)
        except CacheRefusedError:
            code = DECODE_ABORTED
        if code == DECODE_OK:
            held.tokens += piece
            del held.lost[: len(piece)]
            self.tokens += len(piece)
            self.seconds += time.monotonic() - began
        elif code == DECODE_ABORTED:
            self._memory.make_room(0)
        else:  # there is no room after all
            held.lost.clear()
