"""``POST /v1/embeddings``."""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

from fastapi import APIRouter, Request

from kvpsi.serving.api.answers import check_model
from kvpsi.serving.api.errors import ApiError
from kvpsi.serving.api.schema import EmbeddingRequest
from kvpsi.serving.api.stream import unless_gone
from kvpsi.serving.api.tokens import token_lists
from kvpsi.serving.embedding import embed
from kvpsi.serving.service import Service

router = APIRouter()


@router.post("/v1/embeddings", tags=["OpenAI"])
@router.post("/embeddings", include_in_schema=False)
async def embeddings(body: EmbeddingRequest, http: Request) -> dict[str, Any]:
    """Texts as vectors of length 1."""
    service: Service = http.app.state.service
    check_model(service, body.model)
    n_embd = service.context.model.n_embd()
    if body.dimensions not in (None, n_embd):
        raise ApiError(400, f"This model's embeddings have {n_embd} dimensions; leave it out.", param="dimensions")
    texts = await token_lists(service, body.input, param="input")
    longest = max(map(len, texts))
    if longest > service.context.n_ctx:
        raise ApiError(
            400,
            f"A text has {longest} tokens, more than the {service.context.n_ctx} of the context; shorten it.",
            code="context_length_exceeded",
            param="input",
        )
    vectors = []
    for tokens in texts:  # one by one, so that answers go on in between
        vectors.append(await unless_gone(http, service.ask(partial(embed, service.context, tokens))))
    as_base64 = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(v.astype("<f4").tobytes()).decode() if as_base64 else v.tolist(),
        }
        for index, v in enumerate(vectors)
    ]
    n_tokens = sum(map(len, texts))
    return {
        "object": "list",
        "data": data,
        "model": service.name.alias,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }
