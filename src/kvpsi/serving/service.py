"""The engine for asynchronous callers: answers as they come, and cancelled with whoever waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from kvpsi.admission import Pressure
from kvpsi.errors import KvpsiError
from kvpsi.governor import Governor
from kvpsi.governor.cpu import CpuGovernor
from kvpsi.governor.status import status_of
from kvpsi.governor.threads import ThreadSettings
from kvpsi.instrument import Instrument
from kvpsi.kv.spill import SpillFolder
from kvpsi.pressure import PressureSource
from kvpsi.serving.chat import ChatTemplate
from kvpsi.serving.context import ServedContext
from kvpsi.serving.engine import Engine
from kvpsi.serving.headroom import SensedHeadroom
from kvpsi.serving.history import Events, History
from kvpsi.serving.metrics import Latencies
from kvpsi.serving.request import Event, Failed, Finished, Request
from kvpsi.serving.settings import EngineSettings
from kvpsi.serving.status import Status
from kvpsi.serving.thread import ComputingThread

R = TypeVar("R")
_MANY_CHARACTERS = 20_000
_LEAST_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class ModelName:
    """What the served model is called: ``alias`` in answers, and whatever of ``names`` clients ask for."""

    alias: str
    names: frozenset[str]

    def __contains__(self, name: str | None) -> bool:
        return name is None or name == self.alias or name in self.names


class Service:
    """One model that is served. Made in the event loop that uses it.

    Args:
        context: the model; it stays open when the service is closed.
        chat: its template.
        name: what it is called.
        settings: of the engine.
        queue_timeout_s: how long a request may wait before it is begun.
        events: hear what the cache does; the governor tells them as well.
        on_death: told if no more can be answered.
        thread: that made the context; see `Engine`.
        spill: where idle conversations are parked.
    """

    def __init__(
        self,
        context: ServedContext,
        chat: ChatTemplate,
        name: ModelName,
        settings: EngineSettings | None = None,
        *,
        queue_timeout_s: float = 60.0,
        events: Events | None = None,
        on_death: Callable[[KvpsiError], None] = lambda _: None,
        thread: ComputingThread | None = None,
        spill: SpillFolder | None = None,
    ) -> None:
        self.context, self.chat, self.name = context, chat, name
        self.started_s = time.time()
        self._queue_timeout_s = queue_timeout_s
        self._loop = asyncio.get_running_loop()
        self.room = SensedHeadroom()
        self.cpu_governor: CpuGovernor | None = None
        self.latencies: Latencies | None = None
        self.events = events or Events()
        self.engine = Engine(
            context,
            settings,
            self._deliver,
            self.room.spare_bytes,
            self.room.free_bytes,
            on_death=on_death,
            thread=thread,
            spill=spill,
            is_tight=self.room.is_tight,
            pressure=self.pressure,
        )
        try:
            self.history = History(self.status)
        except BaseException:
            self.engine.close()
            raise

    def close(self) -> None:
        """Stop governing, and end all answers with an error."""
        with contextlib.ExitStack() as steps:  # the engine's thread ends whatever happens before
            steps.callback(self.engine.close)
            if self.cpu_governor is not None:
                steps.callback(self.cpu_governor.stop)
            if self.governor is not None:
                steps.callback(self.governor.stop)
            steps.callback(self.history.close)

    def govern(self, source: PressureSource, **options: Any) -> None:
        """Keep the memory within what the machine can spare; options as for `kvpsi.governor.Governor`."""
        self.room.governor = Governor(self.engine.memory, source, **options)
        self.room.governor.start()

    def govern_cpu(
        self, settings: ThreadSettings | None = None, instrument: Instrument | None = None, *, adapts: bool = True
    ) -> None:
        """Watch the processors, and compute with as many threads as they have room for if it ``adapts``."""
        engine = self.engine if adapts else None
        self.cpu_governor = CpuGovernor(engine, settings=settings, instrument=instrument).start()

    def pressure(self) -> Pressure:
        """What the kernel said last of processors, memory and disks; from any thread."""
        reading = self.governor.reading if self.governor else None
        looked = self.cpu_governor.reading if self.cpu_governor else None
        cpu = looked.stall if looked else None
        return Pressure(
            cpu_stall=cpu.some.share if cpu else 0.0,
            cpu_avg10=cpu.some.avg10 if cpu else 0.0,
            memory_stall=reading.memory.some.share if reading else 0.0,
            io_stall=reading.io.some.share if reading else 0.0,
        )

    @property
    def governor(self) -> Governor | None:
        """What keeps the memory within what the machine can spare, if anything does."""
        return self.room.governor

    def status(self) -> Status:
        """What the server is doing."""
        engine, cache, governor = self.engine, self.context.cache, self.governor
        sizes, counters = engine.memory.status(), engine.counters
        decision, law = (governor.decision, governor.settings) if governor else (None, None)
        pressure, threads = self.pressure(), self.cpu_governor.decision if self.cpu_governor else None
        verdict = engine.verdict()
        return Status(
            model=self.name.alias,
            running=len(engine.running),
            waiting=len(engine.admission),
            parallel=engine.settings.parallel,
            sessions=len(engine.sessions),
            sessions_bytes=engine.sessions.n_bytes,
            sessions_dropped=engine.sessions.dropped,
            sessions_parked=engine.sessions.n_parked,
            parked_bytes=engine.sessions.parked_bytes,
            spilled_bytes=engine.parking.n_bytes,
            parked=engine.parking.written,
            restored=engine.parking.read_again,
            parking_failures=engine.parking.failures,
            given_bytes=engine.memory.given_bytes,
            capacity_bytes=sizes.capacity_bytes,
            used_bytes=sizes.used_bytes,
            committed_bytes=cache.committed_cells * cache.bytes_per_cell,
            resident_bytes=cache.resident_bytes(),
            limit_bytes=min(sizes.capacity_bytes, cache.allowed_cells * cache.bytes_per_cell),
            cpu_pressure=pressure.cpu_stall,
            io_pressure=pressure.io_stall,
            threads=cache.n_threads or self.context.n_threads,
            threads_reason=threads.reason if threads and self.cpu_governor and self.cpu_governor.engine else "fixed",
            thread_changes=self.cpu_governor.changes if self.cpu_governor else 0,
            concurrency_limit=min(engine.settings.parallel, verdict.limit) if verdict else engine.settings.parallel,
            admission=engine.admission.policy.name,
            admission_reason=verdict.reason if verdict else "",
            releases=cache.releases,
            trims=cache.trims,
            interrupts=cache.interrupts,
            returned_bytes=engine.memory.returned_bytes,
            forgotten_tokens=counters.forgotten_tokens,
            healed_tokens=engine.healing.tokens,
            healing_s=engine.healing.seconds,
            decodes=counters.decodes,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generated_tokens=counters.generated_tokens,
            tokens_per_second=engine.tokens_per_second(),
            prompt_tokens_per_second=1 / engine.conversations.recompute_s(1) if counters.prompt_s else 0.0,
            busy_s=counters.busy_s,
            prompt_s=counters.prompt_s,
            finished=counters.finished,
            finished_by=dict(counters.finished_by),
            failed=counters.failed,
            cancelled=counters.cancelled,
            rejected=dataclasses.asdict(engine.admission.turned),
            promises=engine.admission.n_promises,
            pauses=counters.pauses,
            governed=governor is not None and cache.trusted,
            reason=cache.distrust_reason or (decision.reason if decision else "not governed"),
            adapts=governor is not None and governor.adapt is not None,
            lookahead_s=law.lookahead_s if law else 0.0,
            step_share=law.max_step_share if law else 0.0,
            stall_share=law.stall_share if law else 0.0,
            calm_hold_s=law.calm_hold_s if law else 0.0,
            grow_share=law.grow_share if law else 0.0,
            uptime_s=time.time() - self.started_s,
            **dataclasses.asdict(status_of(governor, sizes.capacity_bytes)),
        )

    def _deliver(self, events: list[tuple[Request, Event]]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(_tell, events)

    def tokenize(self, text: str, *, add_special: bool, special: bool = True) -> list[int]:
        """Token ids of a text. ``special`` reads the names of control tokens as such."""
        return list(self.context.model.tokenize(text.encode("utf-8", "replace"), add_special, special))

    async def tokens_of(self, text: str, *, add_special: bool, special: bool = True) -> list[int]:
        """The same, beside everything else if the text is long."""
        if len(text) < _MANY_CHARACTERS:
            return self.tokenize(text, add_special=add_special, special=special)
        return await asyncio.to_thread(self.tokenize, text, add_special=add_special, special=special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        return b"".join(map(self.context.piece, tokens)).decode("utf-8", "replace")

    async def ask(self, job: Callable[[], R]) -> R:
        """Have something done by the engine's thread."""
        future: Future[R] = self.engine.ask(job)
        return await asyncio.wrap_future(future)

    async def answer(self, request: Request) -> AsyncIterator[Event]:
        """The events of an answer, `Finished` the last. Whoever stops listening cancels it.

        Raises:
            KvpsiError: it could not be answered, or not to its end.
        """
        events: asyncio.Queue[Event] = asyncio.Queue()
        request.listener = events.put_nowait
        now_s = time.monotonic()  # who does not wait at all is begun where a place is free
        request.begin_by_s = min(now_s + self._queue_timeout_s, max(now_s + _LEAST_WAIT_S, request.wanted_by_s))
        self.engine.submit(request)
        ended = False
        last_s = None
        try:
            while not ended:
                event = await events.get()
                ended = isinstance(event, Finished | Failed)
                if isinstance(event, Failed):
                    raise event.error
                last_s = self._note_time(request, event, last_s)
                yield event
        finally:
            if not ended:
                self.engine.cancel(request)

    def _note_time(self, request: Request, event: Event, last_s: float | None) -> float:
        now = time.monotonic()
        if self.latencies is not None:
            if isinstance(event, Finished):
                self.latencies.whole.observe(now - request.arrived_s)
                self.latencies.queued.observe(event.queued_s)
            elif last_s is None:
                self.latencies.first_token.observe(now - request.arrived_s)
            else:
                self.latencies.inter_token.observe(now - last_s)
        return now


def _tell(events: list[tuple[Request, Event]]) -> None:
    for request, event in events:
        request.listener(event)
