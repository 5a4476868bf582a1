"""``POST /tokenize`` and ``/detokenize``, and prompts that may be text or token ids."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from kvpsi.serving.api.answers import check_model
from kvpsi.serving.api.errors import ApiError
from kvpsi.serving.api.schema import DetokenizeRequest, TokenizeRequest
from kvpsi.serving.service import Service

router = APIRouter()
Prompts = str | list[int] | list[str] | list[list[int]]
_MOST_PROMPTS = 256


@router.post("/tokenize", tags=["tokens"])
async def tokenize(body: TokenizeRequest, http: Request) -> dict[str, Any]:
    """The tokens of a text."""
    service: Service = http.app.state.service
    check_model(service, body.model)
    text = body.content if body.content is not None else body.prompt
    if text is None:
        raise ApiError(400, "There is nothing to tokenize: give `content`.", param="content")
    tokens = await service.tokens_of(text, add_special=bool(body.add_special))
    return {"tokens": tokens, "count": len(tokens), "max_model_len": service.context.n_ctx}


@router.post("/detokenize", tags=["tokens"])
async def detokenize(body: DetokenizeRequest, http: Request) -> dict[str, Any]:
    """The text of tokens."""
    service: Service = http.app.state.service
    check_model(service, body.model)
    text = service.detokenize(_checked(service, body.tokens, "tokens"))
    return {"content": text, "prompt": text}


async def token_lists(service: Service, prompts: Prompts, *, param: str, may_be_empty: bool = False) -> list[list[int]]:
    """Each of the prompts in tokens, those of a text with the token that begins one where the model wants it.

    ``may_be_empty`` lets an empty text be that token alone.

    Raises:
        ApiError: one is empty, there are too many, or a token does not exist.
    """
    one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
    several: list[Any] = [prompts] if one else list(prompts)
    if not 1 <= len(several) <= _MOST_PROMPTS:
        raise ApiError(400, f"Give 1 to {_MOST_PROMPTS} of them, not {len(several)}.", param=param)
    found = []
    for prompt in several:
        tokens = (
            await service.tokens_of(prompt, add_special=True)
            if isinstance(prompt, str)
            else _checked(service, prompt, param)
        )
        if not prompt and may_be_empty:
            tokens = tokens or [service.context.model.token_bos()]
        elif not prompt:
            tokens = []
        if not tokens or tokens[0] < 0:
            raise ApiError(400, "It is empty; give some text.", param=param)
        found.append(tokens)
    return found


def _checked(service: Service, tokens: list[int], param: str) -> list[int]:
    n_vocab = service.context.n_vocab
    wrong = next((t for t in tokens if not 0 <= t < n_vocab), None)
    if wrong is not None:
        raise ApiError(400, f"There is no token {wrong}; they go from 0 to {n_vocab - 1}.", param=param)
    return list(tokens)
