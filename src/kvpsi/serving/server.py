"""The server process: answers at once that the model is being loaded, loads it, and serves until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import llama_cpp
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, ProcessCollector

from kvpsi.engines.loading import LoadSettings, preview
from kvpsi.engines.sensing import best_sensing
from kvpsi.errors import EnvironmentProblem, KvpsiError, UsageError
from kvpsi.governor import AdaptSettings, LawSettings
from kvpsi.governor.shares import ShareSettings
from kvpsi.governor.sharing import open_sharing
from kvpsi.governor.threads import ThreadSettings
from kvpsi.instrument import Instrument, Instruments
from kvpsi.kv import CacheSettings
from kvpsi.kv.policies import Auto, EvictionPolicy
from kvpsi.kv.spill import SpillFolder
from kvpsi.pressure import open_source
from kvpsi.serving.api.app import make_app
from kvpsi.serving.chat import ChatTemplate
from kvpsi.serving.context import ContextPlan, ServedContext, open_context
from kvpsi.serving.history import Events
from kvpsi.serving.metrics import Latencies, StatusCollector
from kvpsi.serving.parking import open_folder
from kvpsi.serving.service import ModelName, Service
from kvpsi.serving.settings import EngineSettings
from kvpsi.serving.size import fitting_cells, wanted_cells
from kvpsi.serving.thread import ComputingThread

_CLOSING_S = 5


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What is served, and how.

    Attributes:
        model: the GGUF file.
        alias: what it is called; else the name of the file.
        host, port: where to listen; port 0 takes a free one.
        load: of the model; ``n_ctx`` are the tokens that all conversations together may hold.
        engine: how requests share it.
        cache: what forgetting must leave alone.
        policy: what is forgotten first.
        law: constants of the control law.
        adapt: bounds within which these follow what the machine shows; None: they stay as they are.
        share: weight and priority among other governed models under the same limit.
        cache_limit: most of the cache to use, a share.
        api_keys: any of them opens it; none: everybody may come in.
        allow_origins: of pages elsewhere whose scripts may ask.
        log_requests: whether a line is told for each request.
        chat_template: Jinja2, instead of the model's own.
        queue_timeout_s: how long a request may wait before it is begun.
        most_body_bytes: the largest request.
        spill_dir: where idle conversations are parked when memory gets short; None: beside the models.
        spill_max_bytes: the most that they may take there; 0: none is parked.
        govern: whether memory is given back when others need it.
        adapt_threads: whether threads follow the processors that are free; ``load.n_threads`` then is the most.
        unified: whether all answers share all cells of the cache; else each has an equal part to itself.
    """

    model: Path
    alias: str = ""
    host: str = "127.0.0.1"
    port: int = 8080
    load: LoadSettings = field(default_factory=LoadSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    policy: EvictionPolicy = field(default_factory=Auto)
    law: LawSettings = field(default_factory=LawSettings)
    adapt: AdaptSettings | None = None
    share: ShareSettings = field(default_factory=ShareSettings)
    cache_limit: float = 1.0
    api_keys: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    log_requests: bool = False
    chat_template: str | None = None
    queue_timeout_s: float = 60.0
    most_body_bytes: int = 8 << 20
    spill_dir: Path | None = None
    spill_max_bytes: int = 4 << 30
    govern: bool = True
    adapt_threads: bool = True
    unified: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"There is no port {self.port}; give 1 to 65535 with --port, or 0 for a free one.")
        if not 0 < self.queue_timeout_s < math.inf:
            raise UsageError("A request that may not wait at all is never begun; raise --queue-timeout-s above 0.")
        if self.most_body_bytes < 1024:
            raise UsageError("Requests of less than 1 KiB say nothing; raise --max-body.")


class _Uvicorn(uvicorn.Server):
    """Has all answers end with an error that clients can read, before it waits for them to end."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End; at the second Ctrl-C without waiting for anything, of which uvicorn would print where it stood."""
        if self.should_exit and sig == signal.SIGINT:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        service = getattr(getattr(self.config.app, "state", None), "service", None)
        if service is not None:
            service.engine.end_soon()
        await super().shutdown(sockets)


class Server:
    """One server.

    Args:
        settings: what and how.
        say: takes remarks for people.
        instrument: sees what is sensed, decided and done.
    """

    def __init__(
        self, settings: ServerSettings, say: Callable[[str], None], instrument: Instrument | None = None
    ) -> None:
        self.settings = settings
        self._say = say
        self._events = Events()
        self._instrument = Instruments([self._events] if instrument is None else [self._events, instrument])
        self._failure: BaseException | None = None
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.app = make_app(
            registry=self._registry,
            api_keys=settings.api_keys,
            most_body_bytes=settings.most_body_bytes,
            allow_origins=settings.allow_origins,
            say=say if settings.log_requests else None,
            lifespan=self._lifespan,
        )
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                self.app,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=_CLOSING_S,
                lifespan="on",
            )
        )

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C.

        Raises:
            KvpsiError: the port is taken, or the model cannot be loaded.
        """
        listener = self._listen()
        with contextlib.closing(listener):
            host, port = listener.getsockname()[:2]
            self.address = f"http://{'[' + host + ']' if ':' in host else host}:{port}"
            try:
                self._uvicorn.run([listener])
            except SystemExit as end:  # SIGTERM is how servers are ended; all was done in order by now
                if end.code != 128 + signal.SIGTERM:
                    raise
        if self._failure is not None:
            raise self._failure

    def _listen(self) -> socket.socket:
        host, port = self.settings.host, self.settings.port
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, port), family=family, backlog=256)
        except OSError as error:
            raise EnvironmentProblem(
                f"Nothing can be served at {host} port {port} ({error.strerror or error}); choose another --port "
                "or --host."
            ) from error

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        stack = contextlib.ExitStack()
        loading = asyncio.ensure_future(self._load(app, stack))
        try:
            yield
        finally:
            await loading  # a model that is being loaded cannot be closed
            app.state.service = None
            await asyncio.to_thread(stack.close)

    def _die(self, error: KvpsiError) -> None:
        self._failure = error
        self._uvicorn.should_exit = True

    async def _load(self, app: FastAPI, stack: contextlib.ExitStack) -> None:
        try:
            spill = await asyncio.to_thread(self._open_spill_folder) if self.settings.govern else None
            thread = ComputingThread()
            stack.callback(thread.stop)
            context, chat = await asyncio.wrap_future(thread.call(self._open, stack))
            s = self.settings
            name = ModelName(s.alias or s.model.stem, frozenset({s.model.stem, s.model.name, "default"}))
            service = Service(
                context,
                chat,
                name,
                s.engine,
                queue_timeout_s=s.queue_timeout_s,
                events=self._events,
                on_death=self._die,
                thread=thread,
                spill=spill,
            )
            stack.callback(service.close)
            if context.cache.mode == "pages":
                source, trigger = best_sensing(context.model.size())
                service.govern(
                    source,
                    settings=s.law,
                    adapt=s.adapt,
                    trigger=trigger,
                    instrument=self._instrument,
                    sharing=open_sharing(s.share),
                )
            threads = ThreadSettings(most_threads=s.load.n_threads)
            service.govern_cpu(threads, self._instrument, adapts=s.adapt_threads)
            service.latencies = Latencies(self._registry, name.alias)
            self._registry.register(StatusCollector(service.status))
            app.state.service = service
        except Exception as error:  # the process ends with it
            if not self._uvicorn.should_exit:
                self._failure = error
                self._uvicorn.should_exit = True
        else:
            if self._uvicorn.should_exit:
                return
            self._say(
                f"{name.alias} is served at {self.address}/v1 (a cache of {context.wanted_cells} tokens, "
                f"{context.n_ctx} at most in one conversation, {s.engine.parallel} answers at once); status page and "
                f"chat: {self.address}/"
            )
            key = " -H 'Authorization: Bearer KEY'" if s.api_keys else ""
            self._say(
                f"try: curl {self.address}/v1/chat/completions -H 'Content-Type: application/json'{key} "
                """-d '{"messages": [{"role": "user", "content": "Name a colour."}]}'"""
            )

    def _open_spill_folder(self) -> SpillFolder | None:
        s = self.settings
        fingerprint = f"{s.model.name} {s.model.stat().st_size} {s.load.kv_type} {llama_cpp.__version__}"
        return open_folder(s.spill_dir, s.spill_max_bytes, fingerprint, self._say)

    def _open(self, stack: contextlib.ExitStack) -> tuple[ServedContext, ChatTemplate]:
        s = self.settings
        known = preview(s.model, "")
        with contextlib.closing(open_source(working_set_file_bytes=s.model.stat().st_size)) as source:
            n_cells, remark = fitting_cells(known, s.load, source.read().headroom, s.law)
        if remark:
            self._say(remark)
        load = replace(s.load, n_ctx=wanted_cells(known, s.load))
        plan = ContextPlan(
            load,
            n_seq=s.engine.parallel + 1,
            settings=s.cache,
            policy=s.policy,
            unified=s.unified,
            cache_limit=s.cache_limit,
            elastic=s.govern,
        )
        context = stack.enter_context(
            open_context(
                s.model,
                plan,
                n_cells,
                instrument=self._instrument,
                is_wanted=lambda: not self._uvicorn.should_exit,
            )
        )
        metadata: dict[str, Any] = dict(known.metadata)
        chat = ChatTemplate(
            s.chat_template or metadata.get("tokenizer.chat_template"),
            eos=context.token_text(context.model.token_eos()),
            bos=context.token_text(context.model.token_bos()),
        )
        return context, chat


def serve(settings: ServerSettings, say: Callable[[str], None], instrument: Instrument | None = None) -> None:
    """Serve until told to end; see `Server.run`."""
    try:
        Server(settings, say, instrument).run()
    except KvpsiError:
        raise
    except (OSError, MemoryError) as error:
        raise EnvironmentProblem(f"The server ended ({error}).") from error
