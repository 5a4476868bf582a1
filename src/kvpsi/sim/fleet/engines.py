"""What the models of all boards of a fleet compute, a tick at a time; arrays have a row for each board.

A token takes as long as `kvpsi.sim.llms.Speed` says. Answers that are written at the same time share the reading of the
weights: each beyond the first takes as much more as reading a token of a prompt does. Prompts are read beside them for
half of the time, or for more if more are being read than written (docs/server.md), all that are read in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvpsi.kv import CacheSettings
from kvpsi.sim.fleet.situation import Floats
from kvpsi.sim.floor import Floor
from kvpsi.sim.llms import Llm, Speed

_PIECE_TOKENS, _SHORT_PIECE_TOKENS = 512.0, 64.0
_WHOLE = 1e-6
FREE = -1


@dataclass(frozen=True, slots=True)
class Ticked:
    """What a tick brought: boards and places of answers that got their first token, and of those that have ended;
    how often each model used all its weights; and the share of the tick in which it waited for memory."""

    first: list[tuple[int, int]]
    ended: list[tuple[int, int]]
    uses: Floats
    stall_share: Floats


class Engines:
    """All boards are alike.

    Args:
        n_boards: how many.
        parallel: places, so many answers at once on each.
        n_ctx: tokens of each cache.
        llm: the model.
        speed: without waiting for memory.
        settings: what eviction leaves alone.

    Attributes:
        request: number of the one that has a place, `FREE` if none has; shape [boards, places], as are
        to_read, to_write, held: tokens of it that are still to be read, to be written, and in the cache; and
        written, read_s, write_s: tokens of its answer, and the engine's time that it took;
        limit_tokens: that the cache of a board may hold, shape [boards], as are
        pressed: whether prompts go in small pieces; and
        token_s: seconds for a token of every answer, as it was last.
        forgotten, given_tokens: tokens that were lost, and all that were given, counters of each board.
    """

    def __init__(
        self, n_boards: int, parallel: int, n_ctx: int, llm: Llm, speed: Speed, settings: CacheSettings | None = None
    ) -> None:
        self.n_ctx, self.parallel, self.llm, self.speed = n_ctx, parallel, llm, speed
        self.settings = settings or CacheSettings()
        self._floor = Floor.of(llm, self.settings)
        shape = (n_boards, parallel)
        self.request = np.full(shape, FREE, dtype=np.int64)
        self.to_read, self.to_write, self.held = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.written, self.read_s, self.write_s = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.limit_tokens = np.full(n_boards, float(n_ctx))
        self.pressed = np.zeros(n_boards, dtype=bool)
        self.token_s = np.zeros(n_boards)
        self.forgotten, self.given_tokens = np.zeros(n_boards), np.zeros(n_boards)

    # -- sizes ---------------------------------------------------------------------------------------------------

    def used_tokens(self) -> Floats:
        """In the cache of each board."""
        return np.asarray(self.held.sum(axis=1))

    def floor_tokens(self) -> Floats:
        """Below this no cache can shrink, see `kvpsi.sim.floor`."""
        floor = self._floor
        kept = np.maximum(floor.least_protected, np.minimum(self.held, floor.most_protected).sum(axis=1))
        return np.asarray(np.minimum(self.n_ctx, kept + floor.spare))

    def allowed_tokens(self, floor_tokens: Floats) -> Floats:
        """That each may hold now."""
        return np.asarray(np.minimum(self.n_ctx, np.maximum(self.limit_tokens, floor_tokens)))

    # -- time ----------------------------------------------------------------------------------------------------

    def advance(self, tick_s: float, waited_s: Floats, wait_s: Floats) -> Ticked:
        """One tick.

        Args:
            tick_s: its length.
            waited_s: of it, so much was waited for memory before anything could be computed; shape [boards].
            wait_s: for each use of all weights and of the cache, so much more is waited; shape [boards].
        """
        busy = self.request != FREE
        reading = busy & (self.to_read > 0)
        writing = busy & ~reading
        n_reading, n_writing = reading.sum(axis=1), writing.sum(axis=1)
        speed, used_bytes = self.speed, self.used_tokens() * self.llm.bytes_per_token
        token_s = speed.step_s + np.maximum(0, n_writing - 1) * speed.read_s + speed.byte_s * used_bytes + wait_s
        piece = np.where((n_writing > 0) | self.pressed, _SHORT_PIECE_TOKENS, _PIECE_TOKENS)
        read_s = speed.read_s + speed.read_byte_s * used_bytes + wait_s / piece
        per_writing = np.maximum(1.0, n_reading / np.maximum(1, n_writing))
        share = np.where(n_writing > 0, per_writing / (1 + per_writing), 1.0) * (n_reading > 0)
        left_s = tick_s - waited_s
        most_read = share * left_s / read_s / np.maximum(1, n_reading)
        most_written = (1 - share) * left_s / token_s
        read = np.where(reading, np.minimum(self.to_read, most_read[:, None]), 0.0)
        wrote = np.where(writing, np.minimum(self.to_write, most_written[:, None]), 0.0)
        first = (self.written < 1 - _WHOLE) & (self.written + wrote >= 1 - _WHOLE)
        self.to_read -= read
        self.to_write -= wrote
        self.held += read + wrote
        self.written += wrote
        self.read_s += read * read_s[:, None]
        self.write_s += wrote * (token_s / np.maximum(1, n_writing))[:, None]
        self.token_s = token_s
        ended = writing & (self.to_write <= _WHOLE)
        uses = wrote.max(axis=1) + read.sum(axis=1) / piece
        stalled_s = waited_s + wait_s * uses
        return Ticked(_places(first), _places(ended), uses, np.minimum(1.0, stalled_s / tick_s))

    # -- places --------------------------------------------------------------------------------------------------

    def begin(self, board: int, request: int, to_read: float, to_write: float, written: float) -> int:
        """Give a request a place, which has to be there; its number."""
        place = int(np.argmin(self.request[board]))
        at = board, place
        self.request[at] = request
        self.to_read[at], self.to_write[at], self.written[at] = to_read, to_write, written
        self.held[at] = self.read_s[at] = self.write_s[at] = 0.0
        return place

    def free(self, board: int, place: int) -> None:
        """A place is free again, and with it the cells."""
        at = board, place
        self.request[at] = FREE
        self.to_read[at] = self.to_write[at] = self.written[at] = self.held[at] = 0.0

    def give_up(self, board: int, place: int) -> int:
        """The same for an answer that is to go on later; the tokens that it held."""
        held = int(self.held[board, place])
        self.given_tokens[board] += held
        self.free(board, place)
        return held

    def forget(self, board: int, place: int, n_tokens: float) -> int:
        """Forget so many tokens of an answer or a little more, as far as they are not protected; how many."""
        block = self.llm.block_tokens
        may_go = int(self.held[board, place]) - self._floor.most_protected
        gone = max(0, min(may_go, -(-int(max(n_tokens, self.settings.min_prune)) // block) * block))
        self.held[board, place] -= gone
        self.forgotten[board] += gone
        self.given_tokens[board] += gone
        return gone


def _places(mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> list[tuple[int, int]]:
    boards, places = np.nonzero(mask)
    return list(zip(boards.tolist(), places.tolist(), strict=True))
