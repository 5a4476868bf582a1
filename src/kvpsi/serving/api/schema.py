"""What clients may send. Fields that llama-cpp-python's own types have are theirs; null means the default."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import llama_cpp
from llama_cpp.server import types
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kvpsi.serving.sampling import SamplingSettings

_MOST_CHOICES = 16
_MOST_STOPS = 16

Temperature = Annotated[float | None, Field(ge=0, le=5)]
Share = Annotated[float | None, Field(ge=0, le=1)]
Penalty = Annotated[float | None, Field(ge=-2, le=2)]
Count = Annotated[int | None, Field(ge=1, lt=1 << 31)]
Stops = Annotated[list[str], Field(max_length=_MOST_STOPS)]


class StreamOptions(BaseModel):
    """What a stream tells besides the text."""

    include_usage: bool | None = False


class JsonSchema(BaseModel):
    """A schema that the answer has to follow."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    name: str = "answer"
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of the answer."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None
    plain_schema: dict[str, Any] | None = Field(
        default=None, alias="schema", description="llama.cpp's own way to give one with json_object."
    )


def _as_known(message: Any) -> Any:
    """A message as llama-cpp-python's types know it.

    ``developer`` is OpenAI's newer name of ``system``, and the content of a message that calls tools may be null.
    """
    if not isinstance(message, dict):
        return message
    known = {key: value for key, value in message.items() if not (key == "content" and value is None)}
    if known.get("role") == "developer":
        known["role"] = "system"
    if known.get("role") != "assistant":
        known.setdefault("content", None)
    content = known.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        known["content"] = "".join(str(part.get("text", "")) for part in content)
    return known


Message = Annotated[
    llama_cpp.ChatCompletionRequestSystemMessage
    | llama_cpp.ChatCompletionRequestUserMessage
    | llama_cpp.ChatCompletionRequestAssistantMessage
    | llama_cpp.ChatCompletionRequestToolMessage
    | llama_cpp.ChatCompletionRequestFunctionMessage,
    Field(discriminator="role"),
]


def _with_parameters(tool: Any) -> Any:
    """A tool whose function has parameters, if only none: OpenAI allows to leave them out."""
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or function.get("parameters") is not None:
        return tool
    return {**tool, "function": {**function, "parameters": {"type": "object", "properties": {}}}}


Tool = Annotated[llama_cpp.ChatCompletionTool, BeforeValidator(_with_parameters)]


class _Sampled(BaseModel):
    """What both kinds of completion have, where it differs from llama-cpp-python's types."""

    max_tokens: Count = Field(default=None, description="The most tokens to generate.")
    temperature: Temperature = None
    top_p: Share = None
    min_p: Share = None
    top_k: Annotated[int | None, Field(ge=-1, lt=1 << 31, description="0 and -1: all tokens.")] = None
    repeat_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int | None, Field(ge=-(1 << 63), lt=1 << 63)] = None
    stop: str | Stops | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Field(ge=1, le=_MOST_CHOICES)] = 1
    ignore_eos: bool | None = False

    def sampling(self, n_vocab: int, choice: int, grammar: str | None) -> SamplingSettings:
        """How the tokens of the ``choice``-th answer are chosen.

        Raises:
            UsageError: a bias is for a token that there is not.
        """
        from kvpsi.errors import UsageError

        default = SamplingSettings()
        bias: dict[int, float] = {}
        for name, value in (self.logit_bias or {}).items():
            if not (name.isascii() and name.isdecimal() and len(name) < 12) or int(name) >= n_vocab:
                raise UsageError(f"logit_bias names a token {name!r}; they are numbers from 0 to {n_vocab - 1}.")
            bias[int(name)] = value

        def given(name: str) -> Any:
            value = getattr(self, name)
            return getattr(default, name) if value is None else value

        return SamplingSettings(
            temperature=given("temperature"),
            top_k=max(0, given("top_k")),
            top_p=given("top_p"),
            min_p=given("min_p"),
            repeat_penalty=given("repeat_penalty"),
            frequency_penalty=given("frequency_penalty"),
            presence_penalty=given("presence_penalty"),
            logit_bias=bias,
            seed=None if self.seed is None else self.seed + choice,
            grammar=grammar,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(s for s in found if s)

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Sampled, types.CreateChatCompletionRequest):  # type: ignore[misc]
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Annotated[Message, BeforeValidator(_as_known)]], Field(min_length=1)]
    max_completion_tokens: Count = Field(default=None, description="The newer name of max_tokens.")
    logprobs: bool | None = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(_Sampled, types.CreateCompletionRequest):  # type: ignore[misc]
    """``POST /v1/completions``."""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool | None = False
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    max_tokens: Count = Field(default=16, description="The most tokens to generate.")


class EmbeddingRequest(types.CreateEmbeddingRequest):  # type: ignore[misc]
    """``POST /v1/embeddings``."""

    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = None


class TokenizeRequest(BaseModel):
    """``POST /tokenize``."""

    content: str | None = Field(default=None, description="The text; llama.cpp's server calls it so.")
    prompt: str | None = Field(default=None, description="The same; vLLM calls it so.")
    add_special: bool | None = Field(default=False, description="Whether to add the token that begins a text.")
    model: str | None = None


class DetokenizeRequest(types.DetokenizeInputRequest):  # type: ignore[misc]
    """``POST /detokenize``."""
