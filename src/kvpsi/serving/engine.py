"""The thread that owns the model's context: it answers all requests together, one decode after the other."""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # another one before Python 3.11
from typing import Any, TypeVar

import numpy as np

from kvpsi.admission import Admission, Load, Places, Pressure, QueueFullError, Verdict
from kvpsi.errors import (
    CacheRefusedError,
    EnvironmentProblem,
    KvpsiError,
    PromptTooLongError,
)
from kvpsi.kv import ElasticCache
from kvpsi.kv.forgetting import Forgetting
from kvpsi.kv.gated import DECODE_ABORTED, DECODE_NO_ROOM, DECODE_OK, Forgotten
from kvpsi.kv.spill import SpillFolder
from kvpsi.ladder import Ladder
from kvpsi.serving.answer import Answer
from kvpsi.serving.batch import Batch
from kvpsi.serving.context import ContextLostError, ServedContext
from kvpsi.serving.conversations import Conversations, Held, Prompt
from kvpsi.serving.counters import Counters
from kvpsi.serving.healing import Healing
from kvpsi.serving.memory import CacheMemory
from kvpsi.serving.pace import Pace
from kvpsi.serving.parking import Parking
from kvpsi.serving.prefix import common_prefix
from kvpsi.serving.request import Chosen, Event, Failed, Request, TokenChance
from kvpsi.serving.rungs import ParkedConversations, PausedAnswer, RestingConversation, SavedConversations
from kvpsi.serving.sampling import Sampler, log_probabilities, logits_of
from kvpsi.serving.sessions import Session, Sessions
from kvpsi.serving.settings import EngineSettings
from kvpsi.serving.step import EVEN_PIECE_TOKENS, Part, is_long_prompt, plan
from kvpsi.serving.thread import ComputingThread, job_of

log = logging.getLogger("kvpsi")
R = TypeVar("R")

Deliver = Callable[[list[tuple[Request, Event]]], None]

_LEAST_SHARED_TOKENS = 32
_LEAST_PIECE_TOKENS = 2  # one alone is computed in yet another way
_RETRY_S = 0.05
_LOOK_S = 0.25
_BETWEEN_PIECES_S = 0.001
_REFUSED_FOR_S = 30.0
_PENALTY_TOKENS = 256
_LOOKED_AT = 16
_FIRST_TOKEN_WEIGHT = 0.2
_RECENT_S = 5.0
_MOST_RECENT = 2048
_STEP_CELLS = 256


class ShuttingDownError(KvpsiError):
    """The engine ends before the answer does."""


class Engine:
    """Answers requests until it is closed.

    Args:
        context: the model with its context, which no other thread may touch.
        settings: how requests share it.
        deliver: takes the events of each step at once, in the engine's thread; it must return quickly. By default
            every request's listener is called.
        spare_bytes: memory that could be taken for a while without harm; asked before the context grows.
        free_bytes: memory that could be taken for a moment: a paused answer is copied before it is written to a file.
        on_death: told, by the engine's thread, if it cannot go on.
        thread: in which it works; the one that made the context, or else speed is lost. None: one of its own.
        spill: where idle conversations are parked; it is closed with the engine. None: they are dropped instead.
        is_tight: whether memory may soon be too little, so that they are parked in time.
        pressure: what the kernel says of processors, memory and disks, for admission.
    """

    def __init__(
        self,
        context: ServedContext,
        settings: EngineSettings | None = None,
        deliver: Deliver | None = None,
        spare_bytes: Callable[[], int] = lambda: 0,
        free_bytes: Callable[[], int] = lambda: 0,
        on_death: Callable[[KvpsiError], None] = lambda _: None,
        thread: ComputingThread | None = None,
        spill: SpillFolder | None = None,
        is_tight: Callable[[], bool] = lambda: False,
        pressure: Callable[[], Pressure] = Pressure,
    ) -> None:
        self.context = context
        self.settings = settings or EngineSettings()
        self.sessions = Sessions()
        self.parking = Parking(spill, self.sessions, self.ask)
        self.conversations = Conversations(
            context,
            self.sessions,
            self.parking,
            self._make_room,
            lambda n_tokens: self.memory.missing_cells(n_tokens),
            free_bytes,
        )
        self.running: list[Answer] = []
        self._keeping: Session | None = None
        self._look_at_s = 0.0
        rungs = (
            ParkedConversations(self.sessions, self.parking, self._is_kept),
            SavedConversations(self.sessions, self.conversations, self._is_kept),
            RestingConversation(self.conversations, self._bytes_per_cell),
            PausedAnswer(self.running, self._pause, self.conversations, self._bytes_per_cell),
            Forgetting(lambda: context.cache),
        )
        self.memory = CacheMemory(context, self.sessions, Ladder(rungs), self._shrink_if_idle, self._lossless_cells)
        self.healing = Healing(
            context,
            self.conversations,
            self.memory,
            most_tokens=self.settings.chunk_beside,
            is_tight=is_tight,
            is_on=self.settings.heals,
        )
        s = self.settings
        self.admission: Admission[Request] = Admission(
            s.most_waiting, s.admission, time.monotonic, self._places, self._load
        )
        self.pace = Pace(s.stretch)
        self._pressure = pressure
        self._first_token_s: float | None = None
        self._turned_away: list[Request] = []
        self._n_beginning = 0
        self._cancelled: list[Request] = []
        self.counters = Counters()
        self._deliver = deliver or _tell_listeners
        self._spare_bytes = spare_bytes
        self._on_death = on_death
        self._is_tight = is_tight
        self._events: list[tuple[Request, Event]] = []
        self._paused: dict[Request, Answer] = {}
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._batch = Batch(context.n_batch)
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=_MOST_RECENT)
        self._closing = False
        self._idle = False
        self._refused_since: float | None = None
        self._was_stopped_at: tuple[int, int, int, int] | None = None
        self._seeds = np.random.default_rng()
        context.cache.on_forgotten = self._note_forgotten
        context.cache.makes_room = False  # it is made before, by what loses nothing as far as possible
        self._own_thread: ComputingThread | None = None
        if thread is None:
            thread = self._own_thread = ComputingThread()
        self._ended = thread.call(self._run)

    # -- from any thread -----------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Have a request answered.

        Raises:
            PromptTooLongError: its prompt does not fit into the context.
            QueueFullError: too many wait already.
            TooLateError: it would not be answered in time.
            ShuttingDownError: the engine is closed.
        """
        n_prompt, most = len(request.prompt), self.context.n_ctx
        if n_prompt >= most:
            raise PromptTooLongError(
                f"The prompt has {n_prompt} tokens, but the context holds {most} with the answer; shorten it."
            )
        with self._lock:
            if self._closing:
                raise ShuttingDownError("The server is shutting down; send the request elsewhere, or later.")
            displaced = self.admission.offer(request)
            if displaced is not None:
                self._turned_away.append(displaced)
        self._jobs.put(None)

    def tokens_per_second(self) -> float:
        """Tokens generated a second, over the last few seconds."""
        recent = [(t, n) for t, n in tuple(self._recent) if time.monotonic() - t < _RECENT_S]
        return sum(n for _, n in recent) / _RECENT_S

    def cancel(self, request: Request) -> None:
        """The answer is not wanted any more; nothing more is said of it."""
        request.cancelled = True
        with self._lock:
            self._cancelled.append(request)
        self._jobs.put(None)

    def ask(self, job: Callable[[], R]) -> Future[R]:
        """Have something done by the engine's thread between two steps."""
        do, future = job_of(job)
        if not self._closing:
            self._jobs.put(do)
            if not (self._ended.done() and future.cancel()):  # it may have ended just before
                return future
        refused: Future[R] = Future()
        refused.set_exception(ShuttingDownError("The server is shutting down."))
        return refused

    def verdict(self) -> Verdict:
        """How many are answered at once now, and why."""
        with self._lock:
            return self.admission.look()

    def set_threads(self, n_threads: int) -> None:
        """Compute with so many threads from the next decode on."""
        self.context.cache.set_threads(n_threads)

    def interrupt(self) -> bool:
        """Stop what is being decoded, so that it is done again; whether there was something."""
        return self.context.cache.interrupt()

    def end_soon(self) -> None:
        """Have all answers end with an error, without waiting for it."""
        self._closing = True
        self._jobs.put(None)

    def close(self) -> None:
        """End all answers with an error, and the thread; may be called twice. The context stays open."""
        self.end_soon()
        self._ended.result()
        self.parking.close()
        if self._own_thread is not None:
            self._own_thread.stop()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:  # nobody would hear of it, and all would wait for ever
            log.exception("The engine ended")
            self._closing = True
            problem = EnvironmentProblem(f"The engine ended ({error}); start it again.")
            for request in [*self.admission, *self._turned_away, *(answer.request for answer in self.running)]:
                self._emit(request, Failed(problem))
            with contextlib.suppress(Exception):
                self._flush()
            self._leave_no_job()
            self._on_death(problem)

    def _serve(self) -> None:
        while not self._closing:
            try:
                self._take_jobs()
                self._begin_requests()
                if self.running:
                    self._step()
                elif not len(self.admission) and self.healing.is_due:
                    self.healing.go_on()
                self._park_if_due()
            except ContextLostError as error:
                self._closing = True
                self._on_death(error)
            except Exception as error:  # one request must not end all others for good
                log.exception("The engine failed")
                self._fail_all(EnvironmentProblem(f"The engine failed ({error}); the request may be sent again."))
            self._flush()
        self._fail_all(ShuttingDownError("The server is shutting down."))
        self._flush()
        self._leave_no_job()

    def _take_jobs(self) -> None:
        """Do what was asked for; wait for it if there is nothing else to do."""
        if not self.running:
            self._idle = True
            try:
                job = self._jobs.get(timeout=self._patience_s())
            except queue.Empty:
                job = None
            self._idle = False
            if job is not None:
                job()
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                job()
                return  # one at a time, so that whoever asks again at once does not keep all others waiting

    def _patience_s(self) -> float | None:
        """How long to wait for something to do before looking again."""
        if len(self.admission):
            return _RETRY_S
        if self.healing.is_due:
            return _BETWEEN_PIECES_S
        return _LOOK_S if self.healing.may_come or self.conversations.may_park else None

    def _leave_no_job(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                if job := self._jobs.get_nowait():
                    job()

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self._deliver(events)

    def _emit(self, request: Request, event: Event) -> None:
        self._events.append((request, event))

    # -- beginning and ending ------------------------------------------------------------------------------------

    def _begin_requests(self) -> None:
        for answer in [a for a in self.running if a.request.cancelled]:
            self.counters.cancelled += 1
            self._end(answer)
        with self._lock:
            cancelled, self._cancelled = self._cancelled, []
            for request in [r for r in cancelled if self.admission.discard(r)]:
                self._forget_paused(request)
                self.counters.cancelled += 1
            failed: list[tuple[Request, KvpsiError]] = [*self.admission.overdue()]
            turned_away, self._turned_away = self._turned_away, []
            failed += [(request, QueueFullError(self.admission.retry_after_s(request))) for request in turned_away]
            limit = min(self.settings.parallel, self.admission.limit())
        for request, error in failed:
            self._forget_paused(request)
            self._emit(request, Failed(error))
        while len(self.running) < limit:
            chosen = self._next_to_begin()
            if chosen is None:
                if self._grow_for_those_who_wait():
                    continue
                return
            try:
                self._begin(chosen)
            except KvpsiError as error:
                self.counters.failed += 1
                self._emit(chosen, Failed(error))
            except Exception as error:  # nobody but this request knows of it yet
                log.exception("A request could not be begun")
                self.counters.failed += 1
                self._emit(chosen, Failed(EnvironmentProblem(f"The request could not be begun ({error}).")))
            finally:
                self._n_beginning = 0

    def _next_to_begin(self) -> Request | None:
        """The first in the queue that may begin."""
        unready, places = 0, self.settings.parallel - len(self.running)
        for request in self._in_order():
            if not self._may_begin(request):
                continue
            if not self._is_ready(request):
                unready += 1
                if unready >= places:
                    return None
                continue
            with self._lock:
                if self.admission.take(request):
                    self._n_beginning = 1
                    return request
        return None

    def _in_order(self) -> Iterator[Request]:
        """The first of the queue; mostly that one may begin, and no other is looked at."""
        with self._lock:
            first = self.admission.first_ones(1)
        yield from first
        with self._lock:
            others = self.admission.first_ones(_LOOKED_AT)
        yield from (request for request in others if request not in first)

    def _is_ready(self, request: Request) -> bool:
        """Whether its conversation need not be read from a file first."""
        if not self.sessions.n_parked:
            return True
        paused = self._paused.get(request)
        prompt = Prompt(paused.tokens, request.pin) if paused else _prompt_of(request)
        return self.conversations.is_ready(prompt, [self._held_by(other) for other in self.running])

    def _may_begin(self, request: Request) -> bool:
        """Whether it should not rather wait for another that reads the same, or for room."""
        prompt = request.prompt
        for other in self.running if self.context.plan.unified else ():
            if other.left > 1:
                shared = common_prefix(other.tokens, prompt)
                if shared >= _LEAST_SHARED_TOKENS and shared > other.n_done + _LEAST_SHARED_TOKENS:
                    return False
        return not self.running or self.memory.room_cells() >= self._cells_to_begin(request)

    def _cells_to_begin(self, request: Request) -> int:
        """Cells that it takes until its next token is there."""
        paused = self._paused.get(request)
        return len(paused.tokens if paused else request.prompt) + 1

    def _grow_for_those_who_wait(self) -> bool:
        """Grow if the first in the queue waits for cells that the context does not have; whether it did."""
        with self._lock:
            first = self.admission.first_ones(1)
        return bool(first) and self._grow(self.context.cache.used_cells + self._cells_to_begin(first[0]))

    def _grow(self, n_cells: int) -> bool:
        """Make room for so many cells, if the context is smaller and memory allows; whether it grew."""
        context = self.context
        now, most = context.cache.n_cells, context.wanted_cells
        if n_cells <= now or now >= most:
            return False
        # what several share is there once for each of them afterwards, and for a moment everything is there twice
        held = sum(a.n_done for a in self.running) + self.conversations.resting_tokens
        target = min(most, -(-max(2 * now, n_cells + now // 2, held + now // 2) // _STEP_CELLS) * _STEP_CELLS)
        needed_bytes = (target + held) * context.cache.bytes_per_cell
        if target <= max(now, held) or self._spare_bytes() < needed_bytes:
            return False
        log.info("The context grows from %d to %d tokens.", now, target)
        questions = [(a.seq_id, context.question_of(a.seq_id)) for a in self.running]
        lost = context.grow(target)
        for answer in [a for a in self.running if a.seq_id in lost]:
            answer.n_done = 0
        for answer in self.running:
            context.cache.note_tokens(answer.seq_id, answer.tokens[: answer.n_done])
        for seq_id, question in questions:
            context.resume_question(seq_id, question)
        self.conversations.note_lost(lost)
        return context.cache.n_cells > now

    def _begin(self, request: Request) -> None:
        answer = self._paused.pop(request, None)
        if answer is None:
            seed = int(self._seeds.integers(1 << 32))
            answer = Answer(request, Sampler(self.context.model, request.sampling, seed), self._emit)
            for token in request.prompt[-_PENALTY_TOKENS:] if request.sampling.penalizes else ():
                answer.sampler.accept(token)
        running = [self._held_by(other) for other in self.running]
        prompt = Prompt(answer.tokens, request.pin) if answer.pauses else _prompt_of(request)
        seq_id, n_done = self.conversations.begin(prompt, running)
        answer.begin(seq_id, n_done)
        answer.read_at = self.counters.decodes  # as if it had just had a turn, so that others' long prompts have theirs
        self.context.resume_question(seq_id, answer.question)
        self.counters.cached_tokens += n_done
        self.counters.prompt_tokens += len(answer.tokens) - n_done
        self.admission.costs.note_begun(len(answer.tokens), n_done)
        self.running.append(answer)

    def _held_by(self, answer: Answer) -> Held:
        """What its sequence holds, up to what was forgotten first."""
        n_tokens = answer.n_done
        if answer.forgotten_tokens:
            n_tokens = min(n_tokens, self.context.cache.first_gap(answer.seq_id))
        return Held(answer.seq_id, answer.tokens[:n_tokens], answer.request.pin)

    def _end(self, answer: Answer) -> None:
        """Take an answer out; what its sequence holds is kept for whoever asks on."""
        self.running.remove(answer)
        self._refused_since = None
        answer.sampler.close()
        held = self._held_by(answer)
        n_lost = answer.n_done - len(held.tokens)
        if n_lost and self.context.n_swa:  # it cannot be cut: the window before the gap is gone
            held.tokens.clear()
        elif n_lost:
            # what is read again is read in even pieces, as it would be by a server that never forgot it
            del held.tokens[max(0, len(held.tokens) - max(0, EVEN_PIECE_TOKENS - n_lost)) :]
            held.lost = answer.tokens[len(held.tokens) : answer.n_done] if self.settings.heals else []
            self.context.cache.seq_rm(answer.seq_id, len(held.tokens), -1)
        self.conversations.end(held, alone=not self.running)

    def _forget_paused(self, request: Request) -> None:
        answer = self._paused.pop(request, None)
        if answer is not None:
            answer.sampler.close()

    def _fail_all(self, error: KvpsiError) -> None:
        with self._lock:
            waiting = list(self.admission)
            for request in waiting:
                self.admission.discard(request)
            waiting += self._turned_away
            self._turned_away = []
        for request in waiting:
            self._forget_paused(request)
            self._emit(request, Failed(error))
        self.counters.failed += len(waiting) + len(self.running)
        for answer in list(self.running):
            self._emit(answer.request, Failed(error))
            self.running.remove(answer)
            answer.sampler.close()
            self.conversations.release(answer.seq_id)

    # -- one step ------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        parts = self._fitting_parts()
        if not parts:
            return
        began = time.monotonic()
        outputs = self._fill(parts)
        code = self._decode()
        elapsed_s = time.monotonic() - began
        self.counters.busy_s += elapsed_s
        if code == DECODE_OK:
            self._refused_since = None
            self.counters.decodes += 1
            self._note_step(parts, elapsed_s)
            for part in parts:
                part.sequence.n_done += part.n_tokens
            for answer, index in outputs:
                if not answer.writing:
                    self._note_first_token(answer)
                self._choose(answer, index)
            self._recent.append((time.monotonic(), len(outputs)))
            for answer in [a for a in self.running if a.finished]:
                self.counters.finished += 1
                self.counters.finished_by[answer.reason or "stop"] += 1
                self.admission.costs.note_end(answer.n_generated)
                self._end(answer)
        elif code == DECODE_ABORTED:
            self.memory.make_room(0)
        elif code == DECODE_NO_ROOM:
            self._have_less_to_do()
        else:
            raise EnvironmentProblem(f"llama_decode returned {code}")

    def _note_step(self, parts: Sequence[Part[Answer]], elapsed_s: float) -> None:
        """What it went into: a token of every answer, or tokens of prompts."""
        n_tokens = sum(part.n_tokens for part in parts)
        if parts[0].sequence.left_at_once == 1:
            self.pace.note_answers(elapsed_s, others_each=len(self.running) / len(parts) - 1)
            self.admission.costs.note_answers(n_tokens, elapsed_s)
        else:
            is_long = any(is_long_prompt(part.sequence) for part in parts)
            self.pace.note_prompts(n_tokens, elapsed_s, beside=self._n_writing() > 0, is_long=is_long)
            self.admission.costs.note_prompt(n_tokens, elapsed_s)
            self.counters.prompt_s += elapsed_s
            self.conversations.note_reading(n_tokens, elapsed_s)
            for part in parts:
                part.sequence.read_at = self.counters.decodes

    def _n_writing(self) -> int:
        """Answers that get a token in each decode, and are not read again after a pause either."""
        return sum(answer.left_at_once == 1 for answer in tuple(self.running))

    def _note_first_token(self, answer: Answer) -> None:
        n_read = max(EVEN_PIECE_TOKENS, len(answer.request.prompt) - answer.cached_tokens)
        taken_s = (time.monotonic() - answer.begun_s) / n_read
        before = self._first_token_s
        self._first_token_s = taken_s if before is None else before + _FIRST_TOKEN_WEIGHT * (taken_s - before)

    def _fitting_parts(self) -> list[Part[Answer]]:
        """What to decode next, after room was made for it; an answer may have been paused for that."""
        while True:
            most = min(self.context.n_batch, self.context.cache.most_at_once())
            parts = plan(self.running, most, self.settings.chunk_beside, self.pace.turn())
            n_tokens, n_running = sum(p.n_tokens for p in parts), len(self.running)
            if self.memory.missing_cells(n_tokens) and self._grow(self.context.cache.used_cells + n_tokens):
                continue
            missing = self.memory.make_room(n_tokens)
            if missing and len(self.running) == n_running > 1:
                self._pause_last()
            if len(self.running) == n_running:
                return parts

    def _pause(self, answer: Answer) -> int:
        """Give up what a running answer holds, and the bytes; it goes on later where it was, from a file or after
        reading it again."""
        cache = self.context.cache
        before, held = cache.used_cells, self._held_by(answer)
        is_whole = len(held.tokens) == answer.n_done
        answer.question = self.context.question_of(answer.seq_id)
        self.running.remove(answer)
        answer.n_done = 0
        answer.pauses += 1
        self.counters.pauses += 1
        self._paused[answer.request] = answer
        answer.request.begin_by_s = math.inf  # it was begun in time
        with self._lock:
            self.admission.put_back(answer.request)
        if is_whole:
            self.conversations.set_aside(held)
        else:
            self.conversations.release(held.seq_id)
        return (before - cache.used_cells) * cache.bytes_per_cell

    def _pause_last(self) -> None:
        """Pause the answer that began last, and count what it gave."""
        ladder = self.memory.ladder
        ladder.give(1, sparing=ladder.given_bytes.keys() - {PausedAnswer.name})

    def _fill(self, parts: Sequence[Part[Answer]]) -> list[tuple[Answer, int]]:
        self._batch.clear()
        outputs = []
        for part in parts:
            answer = part.sequence
            tokens = answer.tokens[answer.n_done : answer.n_done + part.n_tokens]
            index = self._batch.add(answer.seq_id, answer.n_done, tokens, output=part.ends)
            if part.ends:
                outputs.append((answer, index))
        return outputs

    def _decode(self) -> int:
        cache = self.context.cache
        # what was stopped may be stopped again only if something changed since, or it would never end
        changes = (cache.releases, cache.trims, cache.thread_changes, sum(self.memory.ladder.given_bytes.values()))
        stoppable = changes != self._was_stopped_at
        try:
            code = cache.decode(self._batch.native, return_when_stopped=stoppable)
        except CacheRefusedError as error:
            if self.memory.make_room(len(self._batch)):
                self._note_refusal(error)
            return DECODE_ABORTED
        self._was_stopped_at = changes if code == DECODE_ABORTED else None
        return code

    def _note_refusal(self, error: CacheRefusedError) -> None:
        """There is no room for anybody just now: try again in a moment, but not for ever."""
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if len(self.running) > 1:
            self._pause_last()
        elif now - self._refused_since > _REFUSED_FOR_S and self.running:
            self._refused_since = None
            answer = self.running[0]
            self.counters.failed += 1
            self._emit(answer.request, Failed(error))
            self._end(answer)
        else:
            time.sleep(_RETRY_S)

    def _have_less_to_do(self) -> None:
        """The cache has no cell left: it grows, somebody has to wait, or the only answer ends where it is."""
        if self._grow(self.context.cache.n_cells + 1):
            return
        if len(self.running) > 1:
            self._pause_last()
            return
        answer = self.running[0]
        if answer.writing:
            answer.finish("length")
        else:
            self._emit(answer.request, Failed(PromptTooLongError("The prompt does not fit into the cache.")))
        self._end(answer)

    def _choose(self, answer: Answer, index: int) -> None:
        context, request = self.context, answer.request
        chances = None
        if request.top_logprobs is not None:
            chances = log_probabilities(logits_of(context.ctx, index, context.n_vocab).copy())
        try:
            token = answer.sampler.sample(context.ctx, index)
        except KvpsiError as error:
            self.counters.failed += 1
            self._emit(request, Failed(error))
            answer.finished = True
            return
        self.counters.generated_tokens += 1
        ends = context.ends_answer(token) and not request.ignore_eos
        chosen = self._chosen(token, chances, request.top_logprobs or 0) if chances is not None and not ends else None
        answer.take(token, context.piece(token), ends=ends, chosen=chosen, most_tokens=context.n_ctx)

    def _chosen(self, token: int, chances: Any, n_top: int) -> Chosen:
        def chance(each: int) -> TokenChance:
            return TokenChance(each, self.context.piece(each), float(chances[each]))

        likeliest = np.argpartition(chances, -n_top)[-n_top:] if n_top else np.empty(0, dtype=np.intp)
        ordered = likeliest[np.argsort(-chances[likeliest], kind="stable")]
        return Chosen(chance(token), tuple(chance(int(each)) for each in ordered))

    # -- admission -----------------------------------------------------------------------------------------------

    def _places(self) -> Places:
        """What is begun; any thread may ask."""
        costs, running = self.admission.costs, tuple(self.running)
        work_s = sum(
            costs.rest_s(max(0, a.left - 1), costs.left_to_write(a.n_generated, a.request.max_tokens)) for a in running
        )
        return Places(len(running) + self._n_beginning, self.settings.parallel, work_s)

    def _load(self) -> Load:
        """How busy the engine and the machine are."""
        n_writing = self._n_writing()
        return Load(
            time_s=time.monotonic(),
            running=len(self.running),
            writing=n_writing,
            parallel=self.settings.parallel,
            waiting=len(self.admission),
            next_wait_s=self.admission.next_wait_s(),
            token_s=self.pace.token_s if n_writing else None,
            first_token_s=self._first_token_s,
            pressure=self._pressure(),
        )

    # -- memory --------------------------------------------------------------------------------------------------

    def _note_forgotten(self, lost: Forgotten) -> None:
        for answer in self.running:
            if answer.seq_id == lost.seq_id:
                answer.forgotten_tokens += lost.n_tokens
        self.conversations.note_forgotten(lost)
        self.counters.forgotten_tokens += lost.n_tokens

    def _make_room(self, n_tokens: int, keeping: Session | None) -> int:
        self._keeping = keeping
        try:
            return self.memory.make_room(n_tokens, of_the_saved_only=True)
        finally:
            self._keeping = None

    def _bytes_per_cell(self) -> int:
        return self.context.cache.bytes_per_cell

    def _lossless_cells(self) -> int:
        """Cells of what rests, or of all answers but the first; any thread may ask."""
        cache, first = self.context.cache, tuple(self.running[:1])
        if not isinstance(cache, ElasticCache):
            return 0
        if not first:
            return self.conversations.resting_tokens
        return max(0, cache.used_cells - cache.held_cells(first[0].seq_id))

    def _is_kept(self, session: Session) -> bool:
        return session is self._keeping

    def _park_if_due(self) -> None:
        now = time.monotonic()
        if now >= self._look_at_s and self.conversations.may_park:
            self._look_at_s = now + _LOOK_S
            try:
                self._park()
            except Exception:  # they are dropped then, which is no reason to end an answer
                log.exception("A conversation could not be parked")

    def _park(self) -> None:
        """Begin to park a conversation if memory is, or may soon be, too little for it."""
        cache = self.context.cache
        short = cache.limit_cells < min(cache.cap_cells, cache.n_cells)
        if short or self._is_tight() or self.memory.missing_cells(cache.allowed_cells // 4) > 0:
            self.conversations.park_one(
                is_idle=not self.running,
                least_idle_s=0.0 if short else self.settings.least_idle_s,
                spare_bytes=self._spare_bytes(),
            )

    def _shrink_if_idle(self) -> int | None:
        """Have memory given if nothing is being answered, and the bytes; None if the engine is busy."""
        if not self._idle:
            return None
        try:
            return self.ask(self._shrink).result(timeout=1.0)
        except (TimeoutError, FutureTimeoutError, KvpsiError):
            return None

    def _shrink(self) -> int:
        """Give what is above the limit."""
        before = self.memory.returned_bytes
        self.memory.make_room(0)
        return self.memory.returned_bytes - before


def _prompt_of(request: Request) -> Prompt:
    """What is to be read for a request. Where most of it is there, so much is read again that an answer which is to be
    repeatable follows from the same roundings as if nothing had been."""
    tokens = request.prompt
    n_alike = EVEN_PIECE_TOKENS if len(tokens) >= EVEN_PIECE_TOKENS else _LEAST_PIECE_TOKENS
    return Prompt(tokens, request.pin, n_alike if request.sampling.repeatable else 1)


def _tell_listeners(events: list[tuple[Request, Event]]) -> None:
    for request, event in events:
        try:
            request.listener(event)
        except Exception:  # a listener must not stop what others wait for
            log.exception("A listener failed")
