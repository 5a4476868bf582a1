"""What chat and text completions share: usage, probabilities, and the requests to the engine."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from kvpsi.serving.api.errors import ApiError
from kvpsi.serving.request import Chosen, Finished, TokenChance
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
            400, f"{n_answers} answers in one request are more than the {most} that fit; send fewer.", param="n"
        )


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
    """Tokens of all choices of one prompt; their common prompt counts once."""
    n_prompt = max(end.prompt_tokens for end in ends)
    n_generated = sum(end.generated_tokens for end in ends)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
        "prompt_tokens_details": {"cached_tokens": min(end.cached_tokens for end in ends)},
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
