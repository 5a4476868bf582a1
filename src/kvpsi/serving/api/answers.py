"""What chat and text completions share: usage, probabilities, and the requests to the engine."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request as HttpRequest

from kvpsi.errors import UsageError
from kvpsi.serving.api.errors import ApiError
from kvpsi.serving.api.headers import flow_of, urgency_of, wait_s_of
from kvpsi.serving.api.schema import ChatRequest, CompletionRequest
from kvpsi.serving.api.stream import merged
from kvpsi.serving.request import Chosen, Finished, Request, Text, TokenChance
from kvpsi.serving.service import Service

UNLIMITED = 1 << 20


def check_model(service: Service, name: str | None) -> None:
    """Raise ApiError unless the model is the one that is served."""
    if name not in service.name:
        raise ApiError(
            404,
            f"There is no model {name!r} here, only {service.name.alias!r}.",
            code="model_not_found",
            param="model",
        )


def check_count(service: Service, n_answers: int) -> None:
    """Raise ApiError if one request asks for more answers than there can ever be places for."""
    settings = service.engine.settings
    most = settings.parallel + settings.most_waiting
    if n_answers > most:
        raise ApiError(
            400,
            f"{n_answers} answers in one request are more than the {most} that --parallel and --queue have room for; "
            "send fewer.",
            param="n",
        )


def engine_request(
    service: Service,
    body: ChatRequest | CompletionRequest,
    http: HttpRequest,
    prompt: Sequence[int],
    choice: int,
    *,
    grammar: str | None,
    max_tokens: int,
    top_logprobs: int | None,
) -> Request:
    """What the engine is asked for the ``choice``-th answer to a prompt.

    Raises:
        ApiError: a bias is for a token that there is not.
    """
    try:
        sampling = body.sampling(service.context.n_vocab, choice, grammar)
    except UsageError as error:
        raise ApiError(400, str(error), param="logit_bias") from error
    wait_s, now_s = wait_s_of(http), time.monotonic()
    return Request(
        prompt=prompt,
        listener=lambda _: None,
        sampling=sampling,
        max_tokens=max_tokens,
        stop=body.stops,
        top_logprobs=top_logprobs,
        ignore_eos=bool(body.ignore_eos),
        pin=http.headers.get("x-session-id") or body.user,
        urgency=urgency_of(http),
        flow=flow_of(http),
        wanted_by_s=math.inf if wait_s is None else now_s + wait_s,
    )


@dataclass(slots=True)
class Whole:
    """One answer from its beginning to its end."""

    text: str
    tokens: list[Chosen]
    end: Finished


async def gather(service: Service, requests: Sequence[Request]) -> list[Whole]:
    """All answers, each when it is whole.

    Raises:
        KvpsiError: one of them could not be answered.
    """
    texts: list[list[str]] = [[] for _ in requests]
    tokens: list[list[Chosen]] = [[] for _ in requests]
    ends: dict[int, Finished] = {}
    async for number, event in merged([service.answer(request) for request in requests]):
        if isinstance(event, Text):
            texts[number].append(event.text)
            tokens[number] += event.tokens
        elif isinstance(event, Finished):
            ends[number] = event
    return [Whole("".join(texts[number]), tokens[number], ends[number]) for number in range(len(requests))]


def new_head(service: Service, kind: str, prefix: str) -> dict[str, Any]:
    """The fields with which every response and chunk begins."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": service.name.alias,
        "system_fingerprint": None,
    }


def usage_of(ends: Sequence[Finished]) -> dict[str, Any]:
    """Tokens of all choices of one prompt; their common prompt counts once. Forgotten ones are told if any."""
    n_prompt = max(end.prompt_tokens for end in ends)
    n_generated = sum(end.generated_tokens for end in ends)
    n_forgotten = sum(end.forgotten_tokens for end in ends)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
        "prompt_tokens_details": {"cached_tokens": min(end.cached_tokens for end in ends)},
        **({"kvpsi_forgotten_tokens": n_forgotten} if n_forgotten else {}),
    }


def chat_logprobs(tokens: Sequence[Chosen]) -> dict[str, Any]:
    """Probabilities as chat completions tell them."""
    return {
        "content": [
            {**_chance(chosen.chance), "top_logprobs": [_chance(each) for each in chosen.top]} for chosen in tokens
        ],
        "refusal": None,
    }


def _chance(chance: TokenChance) -> dict[str, Any]:
    text = chance.piece.decode("utf-8", "replace")
    return {"token": text, "logprob": chance.logprob, "bytes": list(chance.piece)}


def text_logprobs(tokens: Sequence[Chosen], offset: int) -> tuple[dict[str, Any], int]:
    """Probabilities as text completions tell them, from a character of the text on; and where the next begin."""
    names, offsets = [], []
    for chosen in tokens:
        names.append(chosen.chance.piece.decode("utf-8", "replace"))
        offsets.append(offset)
        offset += len(names[-1])
    return {
        "tokens": names,
        "token_logprobs": [chosen.chance.logprob for chosen in tokens],
        "top_logprobs": [
            {each.piece.decode("utf-8", "replace"): each.logprob for each in chosen.top} for chosen in tokens
        ],
        "text_offset": offsets,
    }, offset
