"""``GET /health``, ``/ready``, ``/metrics``, ``/v1/kvpsi/status`` and ``/v1/kvpsi/history``."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from kvpsi.serving.api.errors import error_body

router = APIRouter(tags=["operation"])


@router.get("/health")
@router.head("/health", include_in_schema=False)
@router.get("/v1/health", include_in_schema=False)
async def health(http: Request) -> Response:
    """Whether the process is alive; 503 while the model is being loaded."""
    if getattr(http.app.state, "service", None) is None:
        body = error_body(503, "The model is being loaded; try again in a moment.")
        return JSONResponse(body, 503, {"Retry-After": "1"})
    return JSONResponse({"status": "ok"})


@router.get("/ready")
@router.head("/ready", include_in_schema=False)
async def ready(http: Request) -> Response:
    """Whether a request would be taken now: loaded, and the queue has room."""
    service = getattr(http.app.state, "service", None)
    if service is None:
        return JSONResponse({"status": "loading"}, 503, {"Retry-After": "1"})
    full = service.engine.admission.is_full
    return JSONResponse({"status": "busy" if full else "ready"}, 503 if full else 200)


@router.get("/metrics")
async def metrics(http: Request) -> Response:
    """For Prometheus."""
    return Response(generate_latest(http.app.state.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/kvpsi/history")
async def history(http: Request) -> dict[str, Any]:
    """The status, the last five minutes of it, and what the governor did last."""
    service = http.app.state.service
    return {
        "status": dataclasses.asdict(service.status()),
        "series": service.history.series(),
        "events": service.events.all(),
    }


@router.get("/v1/kvpsi/status")
async def status(http: Request) -> dict[str, Any]:
    """What the server is doing, and why."""
    return dataclasses.asdict(http.app.state.service.status())
