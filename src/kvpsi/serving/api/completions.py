"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from kvpsi.serving import request as engine
from kvpsi.serving.api.answers import (
    check_count,
    check_model,
    engine_request,
    gather,
    new_head,
    text_logprobs,
    usage_of,
)
from kvpsi.serving.api.errors import ApiError
from kvpsi.serving.api.schema import CompletionRequest
from kvpsi.serving.api.stream import merged, streamed, unless_gone
from kvpsi.serving.api.tokens import token_lists
from kvpsi.serving.service import Service

router = APIRouter()


@router.post("/v1/completions", tags=["OpenAI"])
@router.post("/completions", include_in_schema=False)
async def completions(body: CompletionRequest, http: Request) -> Response:
    """Go on with a text."""
    service: Service = http.app.state.service
    check_model(service, body.model)
    if body.suffix:
        raise ApiError(400, "A suffix is not supported; leave it out.", param="suffix")
    if body.best_of is not None and body.best_of > (body.n or 1):
        raise ApiError(400, "best_of is not supported beyond n; leave it out.", param="best_of")
    prompts = await token_lists(service, body.prompt, param="prompt", may_be_empty=True)
    check_count(service, len(prompts) * (body.n or 1))
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "Probabilities of the prompt are not supported; leave out echo or logprobs.", param="echo")
    requests = [
        engine_request(
            service,
            body,
            http,
            prompt,
            choice,
            grammar=body.grammar,
            max_tokens=body.max_tokens or 16,
            top_logprobs=body.logprobs,
        )
        for prompt in prompts
        for choice in range(body.n or 1)
    ]
    echoes = [service.detokenize(request.prompt) if body.echo else "" for request in requests]
    if body.stream:
        return await streamed(http, _chunks(service, body, requests, echoes))
    return JSONResponse(await unless_gone(http, _whole(service, body, requests, echoes)))


async def _whole(
    service: Service, body: CompletionRequest, requests: Sequence[engine.Request], echoes: Sequence[str]
) -> dict[str, Any]:
    answers = await gather(service, requests)
    choices = [
        {
            "index": number,
            "text": echoes[number] + answer.text,
            "logprobs": text_logprobs(answer.tokens, len(echoes[number]))[0] if body.logprobs is not None else None,
            "finish_reason": answer.end.reason,
        }
        for number, answer in enumerate(answers)
    ]
    return {
        **new_head(service, "text_completion", "cmpl"),
        "choices": choices,
        "usage": _usage(body, [answer.end for answer in answers]),
    }


def _usage(body: CompletionRequest, ends: Sequence[engine.Finished]) -> dict[str, Any]:
    """Every prompt counts once, whatever ``n`` is."""
    n = body.n or 1
    each = [usage_of(ends[start : start + n]) for start in range(0, len(ends), n)]
    total = {key: sum(u[key] for u in each) for key in ("prompt_tokens", "completion_tokens", "total_tokens")}
    cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in each)
    n_forgotten = sum(u.get("kvpsi_forgotten_tokens", 0) for u in each)
    forgotten = {"kvpsi_forgotten_tokens": n_forgotten} if n_forgotten else {}
    return {**total, "prompt_tokens_details": {"cached_tokens": cached}, **forgotten}


async def _chunks(
    service: Service, body: CompletionRequest, requests: Sequence[engine.Request], echoes: Sequence[str]
) -> AsyncIterator[object]:
    head = new_head(service, "text_completion", "cmpl")
    if body.with_usage:
        head["usage"] = None
    offsets = [len(echo) for echo in echoes]

    def chunk(number: int, text: str, reason: str | None = None, logprobs: Any = None) -> object:
        choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice]}

    for number, echo in enumerate(echoes):
        if echo:
            yield chunk(number, echo)
    ends: dict[int, engine.Finished] = {}
    async for number, event in merged([service.answer(request) for request in requests]):
        if isinstance(event, engine.Text):
            logprobs = None
            if body.logprobs is not None:
                logprobs, offsets[number] = text_logprobs(event.tokens, offsets[number])
            yield chunk(number, event.text, logprobs=logprobs)
        elif isinstance(event, engine.Finished):
            ends[number] = event
            yield chunk(number, "", event.reason)
    if body.with_usage:
        yield {**head, "choices": [], "usage": _usage(body, [ends[number] for number in sorted(ends)])}
