"""Which sequence of the cache holds whose tokens, and what is kept for those who come back.

A conversation that nobody is answering *rests* in the cache until somebody else is answered, and is then *saved*:
copied out of it. A prompt takes over as many of its first tokens as there are anywhere: the whole sequence that rests,
a saved conversation, or the first cells of a sequence that rests or is in use, which it then shares.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvpsi.errors import CacheRefusedError, KvpsiError, LayoutError
from kvpsi.kv.gated import Forgotten
from kvpsi.serving.context import ServedContext
from kvpsi.serving.parking import Parking
from kvpsi.serving.prefix import common_prefix
from kvpsi.serving.sessions import Match, Session, Sessions

log = logging.getLogger("kvpsi")
_LEAST_KEPT_TOKENS = 16
_LEAST_TIMED_TOKENS = 32
_SUPPOSED_S_PER_TOKEN = 0.01
_SMOOTHING = 0.2
_MOST_READS = 2
_LONGEST_WAIT_S = 1.0

MakeRoom = Callable[[int, Session | None], int]


@dataclass(eq=False, slots=True)
class Held:
    """Tokens that a sequence of the cache holds, from the first on without a gap.

    Attributes:
        seq_id: which sequence.
        tokens: what it holds.
        pin: whose they are, if their client said so.
        lost: the tokens that followed, of which some were forgotten.
    """

    seq_id: int
    tokens: list[int]
    pin: str | None
    lost: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens that are to be read, as far as they are not there already.

    Attributes:
        tokens: all of them.
        pin: whose they are, if their client says so.
        n_anew: of the last ones so many are read in any case; the last one always is.
    """

    tokens: Sequence[int]
    pin: str | None = None
    n_anew: int = 1


class Conversations:
    """All of them. Used by the engine's thread only.

    Args:
        context: in whose cache they are.
        sessions: those that are saved.
        parking: where they are parked.
        make_room: has room made for so many more cells, without the session given; the cells that are missing.
        missing_cells: the cells that are missing if so many more are to be taken.
        free_bytes: memory that could be taken for a moment.
    """

    def __init__(
        self,
        context: ServedContext,
        sessions: Sessions,
        parking: Parking,
        make_room: MakeRoom,
        missing_cells: Callable[[int], int],
        free_bytes: Callable[[], int],
    ) -> None:
        self._context = context
        self._sessions = sessions
        self._parking = parking
        self._make_room = make_room
        self._missing_cells = missing_cells
        self._free_bytes = free_bytes
        self._rests_since_s = 0.0
        self._s_per_token = _SUPPOSED_S_PER_TOKEN
        self._free = collections.deque(range(context.n_seq))
        self._resting: Held | None = None
        # a sliding window has lost what lies before the place at which it would be cut
        self._uncut = context.n_swa > 0
        # between streams llama.cpp copies whole sequences only
        self._shares = context.plan.unified and not self._uncut

    @property
    def resting(self) -> Held | None:
        """The one that rests in the cache."""
        return self._resting

    @property
    def resting_tokens(self) -> int:
        """Tokens of the one that rests."""
        resting = self._resting  # looked at once, as any thread may ask
        return len(resting.tokens) if resting else 0

    # -- costs ---------------------------------------------------------------------------------------------------

    def note_reading(self, n_tokens: int, seconds: float) -> None:
        """So many tokens of prompts were read in so much time."""
        if n_tokens >= _LEAST_TIMED_TOKENS:
            self._s_per_token += _SMOOTHING * (seconds / n_tokens - self._s_per_token)

    def recompute_s(self, n_tokens: int) -> float:
        """Seconds until the model has read so many tokens."""
        return n_tokens * self._s_per_token

    # -- beginning and ending ------------------------------------------------------------------------------------

    def is_ready(self, prompt: Prompt, running: Sequence[Held]) -> bool:
        """Whether what there is of a prompt is in memory; if not, it is read from its file from now on."""
        if not self._sessions.n_parked:
            return True
        in_cache = [*running, self._resting] if self._resting else running
        match = self._worth_loading(prompt, self._longest(prompt, in_cache)[1], in_memory=False)
        if match is None or match.session.state is not None:
            return True
        session, reading = match.session, self._parking.reading
        if reading is not None:  # one after the other; but a disk that hangs keeps nobody waiting
            return self._parking.reading_s() > max(_LONGEST_WAIT_S, self.recompute_s(len(reading.tokens)))
        if session.n_reads >= _MOST_READS or self._make_room(len(session.tokens), session):
            return True  # the model reads it again, then
        self._parking.read(session)
        return False

    def begin(self, prompt: Prompt, running: Sequence[Held]) -> tuple[int, int]:
        """A sequence for a prompt, and how many of its first tokens it holds already: all but the last one at most.

        ``running`` is what the sequences hold that are in use.
        """
        resting = self._resting
        n_resting = self._usable(resting.tokens, prompt) if resting else 0
        source, n_shared = self._longest(prompt, [*running, resting] if resting else running)
        match = self._saved(prompt)
        n_saved = match.n_tokens if match else 0
        if resting is not None and n_resting >= max(n_saved, n_shared, 1) and 2 * n_resting >= len(resting.tokens):
            self._resting = None
            self._context.cache.seq_rm(resting.seq_id, n_resting, -1)
            return resting.seq_id, n_resting
        seq_id = self._free.popleft()
        try:
            return seq_id, self._fill(seq_id, prompt, source, n_shared)
        except BaseException:
            self.release(seq_id)
            raise

    def _fill(self, seq_id: int, prompt: Prompt, source: Held | None, n_shared: int) -> int:
        """Give an empty sequence what is there of a prompt; how many tokens that is."""
        cache, resting = self._context.cache, self._resting
        match = self._worth_loading(prompt, n_shared)
        if source is not None and match is None:
            cache.seq_cp(source.seq_id, seq_id, 0, n_shared)
            self._save_resting()
            return n_shared
        self._save_resting(match.session if match else None)  # it is among the saved ones then
        match = self._worth_loading(prompt, n_shared)
        if match is not None and self._load(match, seq_id):
            return match.n_tokens
        if source is None or source is resting:
            return 0
        cache.seq_cp(source.seq_id, seq_id, 0, n_shared)
        return n_shared

    def end(self, held: Held, *, alone: bool) -> None:
        """Nobody is answering it any more; it rests, or is saved if others are being answered."""
        if len(held.tokens) + len(held.lost) < _LEAST_KEPT_TOKENS:
            self.release(held.seq_id)
            return
        self._save_resting()
        self._resting, self._rests_since_s = held, time.monotonic()
        if not alone:
            self._save_resting()

    def release(self, seq_id: int) -> None:
        """Empty a sequence for others."""
        if self._context.lost:
            return
        self._context.cache.seq_rm(seq_id, -1, -1)
        self._free.append(seq_id)

    def give_resting(self) -> int:
        """Give up what rests; its tokens."""
        resting, self._resting = self._resting, None
        if resting is None:
            return 0
        self.release(resting.seq_id)
        return len(resting.tokens)

    def set_aside(self, held: Held) -> bool:
        """Take a sequence out of the cache, into a file if that is worth it and there is room for a copy for a moment;
        whether it is in one. It comes back to the last bit."""
        n_tokens = len(held.tokens)
        n_bytes = n_tokens * self._context.cache.bytes_per_cell
        is_worth_it = (
            2 * n_bytes < self._free_bytes()
            and self._parking.may_write
            and self._parking.is_worth_it(n_bytes, self.recompute_s(n_tokens))
        )
        loading_bytes = self._sessions.loading_bytes
        self._sessions.loading_bytes += n_bytes  # so that a governor does not take it for a neighbour
        try:
            session = self._copy_of(held) if is_worth_it else None
        finally:
            self._sessions.loading_bytes = loading_bytes
            self.release(held.seq_id)
        if session is None:
            return False
        self._sessions.add(session)
        if self._parking.write_at_once(session):
            self._sessions.unload(session)
            return True
        self._sessions.remove(session)
        return False

    def _copy_of(self, held: Held) -> Session | None:
        cache = self._context.cache
        try:
            return Session(held.tokens, cache.save_sequence(held.seq_id), held.pin) if cache.trusted else None
        except (KvpsiError, OSError) as error:
            log.info("A conversation is read again later, as it could not be saved: %s", error)
            return None

    def note_lost(self, seq_ids: Sequence[int]) -> None:
        """These sequences are empty now."""
        if self._resting is not None and self._resting.seq_id in seq_ids:
            self._free.append(self._resting.seq_id)
            self._resting = None

    def note_forgotten(self, lost: Forgotten) -> None:
        """The cache has forgotten something."""
        if self._resting is not None and self._resting.seq_id == lost.seq_id:
            self._resting.tokens = self._resting.tokens[: lost.first_pos]

    # -- parking -------------------------------------------------------------------------------------------------

    @property
    def may_park(self) -> bool:
        """Whether there may be something that could be parked now."""
        return self._parking.is_on and (self._resting is not None or self._sessions.n_bytes > 0)

    def park_one(self, *, is_idle: bool, least_idle_s: float, spare_bytes: int) -> None:
        """Begin to park a conversation.

        Args:
            is_idle: whether nobody is being answered; then that which rests is saved, too, so that it comes next.
            least_idle_s: for which nobody has been answering it.
            spare_bytes: memory that could be taken without harm.
        """
        session = self._parking.next(self.recompute_s, least_idle_s)
        resting = self._resting
        if session is not None:
            self._parking.write(session)
        elif (
            is_idle
            and resting is not None
            and not resting.lost  # it is to be healed first
            and time.monotonic() - self._rests_since_s >= least_idle_s
            and not self._missing_cells(len(resting.tokens))
            and 2 * len(resting.tokens) * self._context.cache.bytes_per_cell < spare_bytes
        ):
            self._save_resting()

    # -- what there is -------------------------------------------------------------------------------------------

    def _usable(self, held: Sequence[int], prompt: Prompt) -> int:
        """How many of a prompt's first tokens can be taken from held ones."""
        n_anew = 1 if self._uncut else prompt.n_anew
        n_tokens = max(0, min(common_prefix(held, prompt.tokens), len(prompt.tokens) - n_anew))
        return 0 if self._uncut and n_tokens < len(held) else n_tokens

    def _longest(self, prompt: Prompt, sequences: Sequence[Held]) -> tuple[Held | None, int]:
        """The sequence that shares most first tokens with a prompt, and how many; None if that is next to nothing."""
        if not self._shares or not sequences:
            return None, 0
        n_shared, source = max(((self._usable(held.tokens, prompt), held) for held in sequences), key=lambda m: m[0])
        return (source, n_shared) if n_shared >= _LEAST_KEPT_TOKENS else (None, 0)

    def _saved(self, prompt: Prompt, *, in_memory: bool = True) -> Match | None:
        """The saved one that shares most first tokens with a prompt."""
        match = self._sessions.best(prompt.tokens, prompt.pin, in_memory=in_memory)
        return Match(match.session, self._usable(match.session.tokens, prompt)) if match else None

    def _worth_loading(self, prompt: Prompt, n_shared: int, *, in_memory: bool = True) -> Match | None:
        """A saved one that is worth its loading, if ``n_shared`` tokens can be had for nothing."""
        match = self._saved(prompt, in_memory=in_memory)
        least = max(_LEAST_KEPT_TOKENS, len(match.session.tokens) // 8) if match else 0
        return match if match is not None and match.n_tokens - n_shared >= least else None

    def _load(self, match: Match, seq_id: int) -> bool:
        """Take a saved conversation in; whether that was possible."""
        cache, session = self._context.cache, match.session
        if session.state is None:
            return False
        self._make_room(len(session.tokens), session)
        try:
            if not cache.load_sequence(session.state, seq_id):
                return False
        except (CacheRefusedError, LayoutError):
            return False
        cache.note_tokens(seq_id, session.tokens)
        if len(session.tokens) > match.n_tokens:
            cache.seq_rm(seq_id, match.n_tokens, -1)
        session.n_reads = 0
        self._sessions.note_use(session)
        if 2 * match.n_tokens >= len(session.tokens):  # the answer goes on from it
            self._sessions.remove(session)
        return True

    def _save_resting(self, keeping: Session | None = None) -> None:
        """Save what rests in the cache and take it out, so that nobody has to attend to it; ``keeping`` stays."""
        resting, self._resting = self._resting, None
        if resting is not None:
            cache, n_tokens = self._context.cache, len(resting.tokens)
            if n_tokens < _LEAST_KEPT_TOKENS:
                self.release(resting.seq_id)
            elif cache.allowed_cells < cache.n_cells and self._make_room(n_tokens, keeping):
                if not self.set_aside(resting):  # there is no room for a copy that stays
                    self._sessions.dropped += 1
            else:
                session = self._copy_of(resting)
                self.release(resting.seq_id)
                if session is not None:
                    self._sessions.add(session)
        self._make_room(0, keeping)
