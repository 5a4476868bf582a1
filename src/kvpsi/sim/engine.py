"""The process of a simulated model: it reads, writes, and waits for memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import simpy

from kvpsi.sim.cache import Conversation, SimCache
from kvpsi.sim.conversation import Turn
from kvpsi.sim.llms import Speed
from kvpsi.sim.memory import Events, File, Group, KilledError, Memory, until_killed

_REFUSED_S = 0.05
_GIVE_UP_S = 30.0
LOAD_BYTES_S = 500e6
_COLD_RUNTIME_SHARE = 0.6  # of what a process has besides weights and cache: needed while it starts only
_STOP_S = 0.012  # until a decode that is stopped has ended: 2 to 12 ms were measured


@dataclass(slots=True)
class Work:
    """What a model did.

    Attributes:
        written: tokens.
        reread: tokens that were read again after they had been forgotten.
        missing: tokens that had been forgotten when an answer was begun, of each answer.
        refused: tokens for which there was no room for a long time.
        restarts: conversations that were longer than the context and began anew.
        longest_context: the most tokens that a conversation had in the cache.
        busy_s: in which there was something to do.
        waited_s: in which it waited for room.
    """

    written: int = 0
    reread: int = 0
    missing: int = 0
    refused: int = 0
    restarts: int = 0
    longest_context: int = 0
    busy_s: float = 0.0
    waited_s: float = 0.0


class SimEngine:
    """Answers turns one after the other.

    Args:
        env: the simulation.
        memory: of the board.
        group: the process.
        cache: its cache.
        weights: used once for each token, or for each piece of a prompt.
        speed: without waiting for memory.
        turns: what is asked, in order of time.

    Attributes:
        work: what was done.
        before_token: called before each step.
        extra_s: what each step takes more.
        unread_tokens: of the prompt that is being read.
    """

    def __init__(
        self,
        env: simpy.Environment,
        memory: Memory,
        group: Group,
        cache: SimCache,
        weights: File,
        speed: Speed,
        turns: Sequence[Turn],
    ) -> None:
        self.work = Work()
        self.weights = weights
        self.unread_tokens = 0
        self.before_token: Callable[[], object] = lambda: None
        self.extra_s: Callable[[], float] = lambda: 0.0
        self._env, self._memory, self._group, self._cache = env, memory, group, cache
        self._speed, self._turns = speed, turns

    def start(self) -> None:
        """Begin."""
        self._group.process = self._env.process(until_killed(self._run()))

    def _run(self) -> Events:
        runtime_bytes = self._cache.llm.runtime_bytes
        yield from self._memory.take(self._group, runtime_bytes)
        self._memory.cool_down(self._group, int(_COLD_RUNTIME_SHARE * runtime_bytes))
        self._memory.map(self._group, self.weights)
        yield from self._cache.begin()
        for turn in self._turns:
            yield self._env.timeout(max(0.0, turn.at_s - self._env.now))
            began_s = self._env.now
            yield from self._answer(turn)
            self.work.busy_s += self._env.now - began_s

    def _answer(self, turn: Turn) -> Events:
        cache = self._cache
        conversation = cache.conversations.get(turn.conversation)
        if conversation is not None and conversation.n_tokens + turn.prompt_tokens >= cache.n_ctx:
            self.work.restarts += 1
            cache.drop(conversation)
            conversation = None
        if conversation is None:
            conversation = cache.conversations[turn.conversation] = Conversation(turn.conversation)
        cache.running = conversation
        try:
            if (yield from self._prepare(conversation, turn)):
                yield from self._write(conversation, turn.answer_tokens)
        finally:
            cache.running = None
        conversation.used_at_s = self._env.now
        cache.shrink()

    def _prepare(self, conversation: Conversation, turn: Turn) -> Events:
        """Have all in the cache that an answer follows; false if there was no room for it.

        What was parked is loaded; what was forgotten is read again if all of it fits.
        """
        n_loaded = conversation.parked + (turn.prompt_tokens if turn.at_once else 0)
        conversation.n_tokens += turn.prompt_tokens if turn.at_once else 0
        if n_loaded and not (yield from self._load(conversation, n_loaded)):
            return False
        lost = conversation.forgotten
        self.work.missing += lost
        if lost and conversation.n_tokens + turn.prompt_tokens <= self._cache.allowed_tokens:
            conversation.forgotten = 0
            conversation.n_tokens -= lost
            n_read = yield from self._read(conversation, lost)
            self.work.reread += n_read
            if n_read < lost:
                return False
        n_prompt = 0 if turn.at_once else turn.prompt_tokens
        return (yield from self._read(conversation, n_prompt)) == n_prompt

    def _load(self, conversation: Conversation, n_tokens: int) -> Events:
        """Take so many tokens in from a file, all at once; false if there was no room for them."""
        cache = self._cache
        if not (yield from self._wait_for_room(n_tokens)):
            return False
        cache.loading_tokens = n_tokens
        while cache.loading_tokens:
            part = min(cache.loading_tokens, 512)
            cache.loading_tokens -= part
            yield from cache.add(conversation, part)
            yield self._env.timeout(cache.llm.cache_bytes(part) / LOAD_BYTES_S)
        self._note(conversation)
        return True

    def _read(self, conversation: Conversation, n_tokens: int) -> Events:
        """Read so many tokens; how many were read."""
        done = 0
        while done < n_tokens:
            self.unread_tokens = n_tokens - done
            part = yield from self._step(conversation, n_tokens - done)
            if not part:
                break
            conversation.n_tokens += part
            done += part
        self.unread_tokens = 0
        self.work.refused += n_tokens - done
        return done

    def _write(self, conversation: Conversation, n_tokens: int) -> Events:
        """Write an answer, as long as there is room in the context."""
        for _ in range(min(n_tokens, self._cache.n_ctx - conversation.n_tokens)):
            if not (yield from self._step(conversation, 1)):
                self.work.refused += 1
                return
            conversation.n_tokens += 1
            self.work.written += 1

    def _step(self, conversation: Conversation, most: int) -> Events:
        """Compute some tokens of a conversation, as many as may be at once; how many, 0 if there was no room."""
        cache, may_be_stopped = self._cache, True
        changes = cache.changes
        while True:
            n_tokens = min(most, cache.most_at_once())
            if not (yield from self._wait_for_room(n_tokens)):
                return 0
            self.before_token()
            yield from cache.add(conversation, n_tokens)
            # what was stopped may be stopped again only if something was given meanwhile, or it would never end
            if (yield from self._compute(n_tokens, may_be_stopped or cache.changes > changes)):
                self._note(conversation)
                return n_tokens
            may_be_stopped, changes = False, cache.changes
            yield self._env.timeout(_STOP_S)
            cache.take_back(conversation, n_tokens)
            cache.shrink()

    def _wait_for_room(self, n_tokens: int) -> Events:
        """Whether there is room for so many, at once or after a while."""
        waited_s = 0.0
        while not self._cache.make_room(n_tokens):
            if waited_s >= _GIVE_UP_S:
                return False
            waited_s += _REFUSED_S
            self.work.waited_s += _REFUSED_S
            yield self._env.timeout(_REFUSED_S)
        return True

    def _compute(self, n_tokens: int, may_be_stopped: bool) -> Events:
        """Use weights and cache; false if it was stopped."""
        cache, memory, group = self._cache, self._memory, self._group
        used_bytes = cache.llm.cache_bytes(cache.held_tokens)
        seconds = self._speed.chunk_s(n_tokens, used_bytes) if n_tokens > 1 else self._speed.token_s(used_bytes)
        cache.computing = may_be_stopped
        try:
            yield from memory.read(group, self.weights)
            yield from memory.touch(group)
            yield self._env.timeout(seconds + self.extra_s())
        except simpy.Interrupt as interrupt:
            if isinstance(interrupt.cause, KilledError):
                raise
            return False
        finally:
            cache.computing = False
        return True

    def _note(self, conversation: Conversation) -> None:
        self.work.longest_context = max(self.work.longest_context, conversation.held)
