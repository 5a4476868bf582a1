"""``GET /v1/models``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from kvpsi.serving.api.answers import check_model
from kvpsi.serving.service import Service

router = APIRouter()


@router.get("/v1/models", tags=["OpenAI"])
@router.get("/models", include_in_schema=False)
async def models(http: Request) -> dict[str, Any]:
    """What is served."""
    service: Service = http.app.state.service
    return {"object": "list", "data": [_told(service)]}


@router.get("/v1/models/{model:path}", tags=["OpenAI"])
async def model(model: str, http: Request) -> dict[str, Any]:
    """One model."""
    service: Service = http.app.state.service
    check_model(service, model)
    return _told(service)


def _told(service: Service) -> dict[str, Any]:
    context = service.context
    return {
        "id": service.name.alias,
        "object": "model",
        "created": int(service.started_s),
        "owned_by": "kvpsi",
        "max_model_len": context.n_ctx,
        "meta": {
            "n_vocab": context.n_vocab,
            "n_ctx_train": context.model.n_ctx_train(),
            "n_embd": context.model.n_embd(),
            "n_params": context.model.n_params(),
            "size": context.model.size(),
        },
    }
