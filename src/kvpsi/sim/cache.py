"""The cache of a simulated model: tokens of conversations, and the memory that they take."""

from __future__ import annotations

from dataclasses import dataclass

from kvpsi.kv import CacheSettings
from kvpsi.kv.elastic import piece_at_depth
from kvpsi.sim.floor import Floor
from kvpsi.sim.llms import Llm
from kvpsi.sim.memory import Events, Group, Memory
from kvpsi.status import CacheStatus

_UBATCH_TOKENS = 512


@dataclass(eq=False, slots=True)
class Conversation:
    """One conversation: of ``n_tokens`` that were said so far ``held`` are in the cache, ``forgotten`` are lost, and
    the rest is parked."""

    name: str
    n_tokens: int = 0
    held: int = 0
    forgotten: int = 0
    used_at_s: float = 0.0

    @property
    def parked(self) -> int:
        """Tokens that can be had again from a file."""
        return self.n_tokens - self.held - self.forgotten


class SimCache:
    """What a governor governs. A cache that is not elastic has all its memory from the beginning, and keeps it.

    Args:
        memory: of the board.
        group: the model's process.
        llm: the model.
        n_ctx: tokens that fit.
        elastic: memory is given back.
        settings: what eviction leaves alone.

    Attributes:
        conversations: by name.
        running: the one that is going on.
        loading_tokens: that are being taken in at once.
        computing: whether the model may be stopped now.
        offloaded_share: of every token's bytes, so much lies elsewhere than in memory.
        forgotten_tokens: that were lost, as there was no room.
        shed: (seconds, tokens) of these, that were lost so that the cache gets smaller, and not for new tokens.
        parked_tokens: of conversations that were not going on.
        returned_bytes: all that ever went back.
        changes: how often something was given.
    """

    def __init__(
        self,
        memory: Memory,
        group: Group,
        llm: Llm,
        n_ctx: int,
        *,
        elastic: bool,
        settings: CacheSettings | None = None,
    ) -> None:
        self.llm, self.n_ctx, self.elastic = llm, n_ctx, elastic
        self.settings = settings or CacheSettings()
        self._floor = Floor.of(llm, self.settings)
        self.conversations: dict[str, Conversation] = {}
        self.running: Conversation | None = None
        self.loading_tokens = 0
        self.computing = False
        self.offloaded_share = 0.0
        self.forgotten_tokens = self.parked_tokens = 0
        self.shed: list[tuple[float, int]] = []
        self.returned_bytes = self.changes = 0
        self._chunk_tokens: int | None = None
        self._limit_tokens = n_ctx
        self._memory, self._group = memory, group

    @property
    def is_alive(self) -> bool:
        """Whether the model was not killed."""
        return self._group.alive

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def held_tokens(self) -> int:
        """In the cache, of all conversations."""
        return sum(each.held for each in self.conversations.values())

    @property
    def resident_bytes(self) -> int:
        """What of the cache is committed."""
        return self._in_memory(self.held_tokens) if self.elastic else self.llm.cache_bytes(self.n_ctx)

    @property
    def protected_tokens(self) -> int:
        """That stay, of one conversation at least: its beginning, its end, and the first and the last turn."""
        of_each = self._floor.most_protected
        return max(self._floor.least_protected, sum(min(each.held, of_each) for each in self.conversations.values()))

    @property
    def floor_tokens(self) -> int:
        """Below this it cannot shrink."""
        return min(self.n_ctx, self.protected_tokens + self._floor.spare)

    @property
    def allowed_tokens(self) -> int:
        """That may be held now."""
        return min(self.n_ctx, max(self._limit_tokens, self.floor_tokens))

    @property
    def room_tokens(self) -> int:
        """That may be taken before anything has to go."""
        return self.allowed_tokens - self.held_tokens

    def most_at_once(self) -> int:
        """Tokens of a prompt's next piece: as `kvpsi.kv.ElasticCache` has it, for one thread."""
        most = min(self._chunk_tokens or _UBATCH_TOKENS, _UBATCH_TOKENS)
        if not self.elastic:
            return most
        if self.allowed_tokens < self.n_ctx:
            most = min(most, self.allowed_tokens - min(self.held_tokens, self.protected_tokens))
        return max(1, min(most, piece_at_depth(self.held_tokens, n_threads=1)))

    # -- what a governor needs -----------------------------------------------------------------------------------

    def status(self) -> CacheStatus:
        """See `kvpsi.governor.Governed`."""
        resting = sum(each.held for each in self.conversations.values() if each is not self.running)
        per_token = self._in_memory(1)
        return CacheStatus(
            capacity_bytes=self.n_ctx * per_token,
            used_bytes=(self.held_tokens + self.loading_tokens) * per_token,
            floor_bytes=self.floor_tokens * per_token,
            returned_bytes=self.returned_bytes,
            loading_bytes=self.loading_tokens * per_token,
            lossless_bytes=resting * per_token,
            forgotten_bytes=self.forgotten_tokens * per_token,
        )

    def set_limit(self, limit_bytes: int, chunk_tokens: int | None) -> None:
        """See `kvpsi.governor.Governed`."""
        self._limit_tokens, self._chunk_tokens = limit_bytes // self._in_memory(1), chunk_tokens

    def give_now(self) -> int | None:
        """Shrink to the limit; the bytes given, None while the model is at work."""
        if self.running is not None or not self._group.alive:
            return None
        before = self.returned_bytes
        self.shrink()
        return self.returned_bytes - before

    def interrupt(self) -> bool:
        """Ask a busy model to make room at once."""
        process = self._group.process
        if process is None or not self.computing or not process.is_alive:
            return False
        self.computing = False
        process.interrupt()
        return True

    # -- what the model does -------------------------------------------------------------------------------------

    def begin(self) -> Events:
        """Take what a cache takes when it is made: llama.cpp fills all of it with zeros."""
        if not self.elastic:
            yield from self._memory.take(self._group, self.llm.cache_bytes(self.n_ctx), zero=True)

    def add(self, conversation: Conversation, n_tokens: int) -> Events:
        """Put so many tokens of a conversation in, for which there has to be room."""
        conversation.held += n_tokens
        n_bytes = self._in_memory(n_tokens)
        if self.elastic:
            yield from self._memory.take(self._group, n_bytes)
        else:
            yield from self._memory.warm_up(self._group, n_bytes)

    def take_back(self, conversation: Conversation, n_tokens: int) -> None:
        """Take out what was put in last, as it was not computed in the end."""
        self._drop(conversation, n_tokens)

    def shrink(self) -> None:
        """Have no more than is allowed, as far as that can be done."""
        self.make_room(0)

    def make_room(self, n_tokens: int) -> bool:
        """Have less until so many tokens fit; false if that cannot be done, and then nothing has changed.

        Conversations that rest are parked first, the one that was used longest ago before others; then the one that is
        going on is forgotten from its beginning, whole blocks of it.
        """
        missing = n_tokens - self.room_tokens
        if missing <= 0:
            return True
        resting = [each for each in self.conversations.values() if each is not self.running and each.held]
        may_go = sum(each.held for each in resting) + self._may_forget()
        if n_tokens > 0 and may_go < missing:
            return False
        for each in sorted(resting, key=lambda each: each.used_at_s):
            if missing > 0:
                missing -= each.held
                self.parked_tokens += each.held
                self._give(each, each.held)
        if missing > 0:
            self.forget(missing, for_new=min(missing, n_tokens))
        return True

    def forget(self, n_tokens: int, *, for_new: int = 0) -> int:
        """Forget so many of the conversation that is going on, or a little more, of which so many make room for new
        ones; how many."""
        conversation, block = self.running, self.llm.block_tokens
        if conversation is None:
            return 0
        blocks = -(-max(n_tokens, self.settings.min_prune) // block)
        gone = min(self._may_forget(), blocks * block)
        self.forgotten_tokens += gone
        conversation.forgotten += gone
        if shed := min(gone, n_tokens - for_new):
            self.shed.append((float(self._memory.env.now), shed))
        self._give(conversation, gone)
        return gone

    def drop(self, conversation: Conversation) -> None:
        """A conversation is over."""
        self._drop(conversation, conversation.held)
        del self.conversations[conversation.name]

    def _may_forget(self) -> int:
        """Tokens of the conversation that is going on that are not protected."""
        return max(0, self.running.held - self._floor.most_protected) if self.running is not None else 0

    def _give(self, conversation: Conversation, n_tokens: int) -> None:
        if n_tokens > 0:
            self._drop(conversation, n_tokens)
            self.changes += 1
            if self.elastic:
                self.returned_bytes += self._in_memory(n_tokens)

    def _drop(self, conversation: Conversation, n_tokens: int) -> None:
        conversation.held -= n_tokens
        n_bytes = self._in_memory(n_tokens)
        if self.elastic:
            self._memory.give(self._group, n_bytes)
        else:
            self._memory.cool_down(self._group, n_bytes)

    def _in_memory(self, n_tokens: int) -> int:
        """Bytes that so many tokens take there."""
        return n_tokens * int(self.llm.bytes_per_token * (1 - self.offloaded_share))
