"""``POST /v1/chat/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from llama_cpp.llama_grammar import JSON_GBNF

from kvpsi.errors import UsageError
from kvpsi.serving import request as engine
from kvpsi.serving.api.answers import (
    UNLIMITED,
    chat_logprobs,
    check_count,
    check_model,
    engine_request,
    gather,
    new_head,
    usage_of,
)
from kvpsi.serving.api.errors import ApiError
from kvpsi.serving.api.schema import ChatRequest
from kvpsi.serving.api.stream import merged, streamed, unless_gone
from kvpsi.serving.chat import ToolCall, ToolStream, schema_of_a_call, tool_calls_in
from kvpsi.serving.json_schema import gbnf_of
from kvpsi.serving.service import Service

router = APIRouter()


@router.post("/v1/chat/completions", tags=["OpenAI"])
@router.post("/chat/completions", include_in_schema=False)
async def chat_completions(body: ChatRequest, http: Request) -> Response:
    """Go on with a conversation."""
    service: Service = http.app.state.service
    check_model(service, body.model)
    tools = _tools_of(body, service)
    check_count(service, body.n or 1)
    grammar = await asyncio.to_thread(_grammar_of, body, tools)
    prompt = await service.tokens_of(service.chat.prompt(body.messages, tools), add_special=False)
    if not prompt:
        raise ApiError(400, "The messages make an empty prompt.", param="messages")
    requests = [
        engine_request(
            service,
            body,
            http,
            prompt,
            choice,
            grammar=grammar,
            max_tokens=body.max_completion_tokens or body.max_tokens or UNLIMITED,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        for choice in range(body.n or 1)
    ]
    names = [tool["function"]["name"] for tool in tools or ()]
    if body.stream:
        return await streamed(http, _chunks(service, body, requests, names))
    return JSONResponse(await unless_gone(http, _whole(service, body, requests, names)))


def _tools_of(body: ChatRequest, service: Service) -> Sequence[Mapping[str, Any]] | None:
    """The tools that the model is told of."""
    for old, new in (("functions", "tools"), ("function_call", "tool_choice")):
        if getattr(body, old, None):
            raise ApiError(400, f"`{old}` is the old name of `{new}` and is not understood; send `{new}`.", param=old)
    if not body.tools or body.tool_choice == "none":
        if isinstance(body.tool_choice, dict) or body.tool_choice == "required":
            raise ApiError(400, "tool_choice asks for a tool, but there are none in `tools`.", param="tool_choice")
        return None
    if not service.chat.knows_tools:
        raise ApiError(
            400,
            "This model's chat template does not know tools; serve one that does, or give the server a template "
            "with --chat-template.",
            param="tools",
        )
    tools: Sequence[Mapping[str, Any]] = body.tools
    return tools


def _grammar_of(body: ChatRequest, tools: Sequence[Mapping[str, Any]] | None) -> str | None:
    """What the answer has to follow."""
    form, choice = body.response_format, body.tool_choice
    if tools and (choice == "required" or isinstance(choice, dict)):
        name = choice["function"]["name"] if isinstance(choice, dict) else None
        return _gbnf(schema_of_a_call(tools, name), "tools")
    if body.grammar is not None:
        return str(body.grammar)
    if form is None or form.type == "text":
        return None
    if form.type == "json_schema":
        if form.json_schema is None or form.json_schema.json_schema is None:
            raise ApiError(400, "response_format has no json_schema.schema.", param="response_format")
        return _gbnf(form.json_schema.json_schema, "response_format")
    return _gbnf(form.plain_schema, "response_format") if form.plain_schema else JSON_GBNF


def _gbnf(schema: Mapping[str, Any], param: str) -> str:
    try:
        return gbnf_of(schema)
    except UsageError as error:
        raise ApiError(400, str(error), param=param) from error


async def _whole(
    service: Service, body: ChatRequest, requests: Sequence[engine.Request], names: Sequence[str]
) -> dict[str, Any]:
    answers = await gather(service, requests)
    choices = []
    for number, answer in enumerate(answers):
        text, calls = tool_calls_in(answer.text, names) if names else (answer.text, [])
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        choices.append(
            {
                "index": number,
                "message": message,
                "logprobs": chat_logprobs(answer.tokens) if body.logprobs else None,
                "finish_reason": "tool_calls" if calls else answer.end.reason,
            }
        )
    return {
        **new_head(service, "chat.completion", "chatcmpl"),
        "service_tier": None,
        "choices": choices,
        "usage": usage_of([answer.end for answer in answers]),
    }


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


async def _chunks(
    service: Service, body: ChatRequest, requests: Sequence[engine.Request], names: Sequence[str]
) -> AsyncIterator[object]:
    head = new_head(service, "chat.completion.chunk", "chatcmpl")
    if body.with_usage:
        head["usage"] = None

    def chunk(number: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> object:
        return {**head, "choices": [{"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]}

    begun: set[int] = set()
    tools = [ToolStream(names) for _ in requests]
    ends: list[engine.Finished] = []
    async for number, event in merged([service.answer(request) for request in requests]):
        if number not in begun:
            begun.add(number)
            yield chunk(number, {"role": "assistant", "content": "", "refusal": None})
        if isinstance(event, engine.Text):
            shown = tools[number].feed(event.text) if names else event.text
            if shown or body.logprobs:
                logprobs = chat_logprobs(event.tokens) if body.logprobs else None
                yield chunk(number, {"content": shown}, logprobs=logprobs)
        elif isinstance(event, engine.Finished):
            text, calls = tools[number].finish()
            if text:
                yield chunk(number, {"content": text})
            for index, call in enumerate(calls):
                yield chunk(number, {"tool_calls": [{"index": index, **_call(call)}]})
            yield chunk(number, {}, "tool_calls" if calls else event.reason)
            ends.append(event)
    if body.with_usage:
        yield {**head, "choices": [], "usage": usage_of(ends)}
