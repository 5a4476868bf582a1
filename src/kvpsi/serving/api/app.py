"""Puts the API together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Lifespan

from kvpsi import __version__
from kvpsi.serving.api import chat, completions, embeddings, errors, health, models, page, tokens
from kvpsi.serving.api.guard import Guard
from kvpsi.serving.api.log import RequestLog

_MOST_BODY_BYTES = 8 << 20


def make_app(
    *,
    registry: CollectorRegistry,
    api_keys: Sequence[str] = (),
    most_body_bytes: int = _MOST_BODY_BYTES,
    allow_origins: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
    lifespan: Lifespan[FastAPI] | None = None,
) -> FastAPI:
    """The application. It answers once somebody sets ``app.state.service``.

    Args:
        registry: of the metrics.
        api_keys: any of them opens it; none: no key is needed.
        most_body_bytes: the largest request.
        allow_origins: of pages elsewhere whose scripts may ask.
        say: takes a line for each request.
        lifespan: loads the model and closes it.
    """
    app = FastAPI(
        title="kvpsi",
        version=__version__,
        description="A local LLM behind OpenAI's API, whose memory shrinks when others need it.",
        lifespan=lifespan,
        docs_url=None,  # they would be fetched from elsewhere
        redoc_url=None,
    )
    app.add_middleware(
        Guard,
        api_keys=api_keys,
        most_body_bytes=most_body_bytes,
        is_loaded=lambda: app.state.service is not None,
    )
    app.add_middleware(RequestLog, say=say)
    if allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allow_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.state.registry = registry
    app.state.service = None
    errors.install(app)
    for part in (chat, completions, embeddings, models, tokens, health, page):
        app.include_router(part.router)
    return app
