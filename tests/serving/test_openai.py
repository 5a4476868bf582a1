"""The official client, unmodified, against the real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from support.servers import Served, serving

pytestmark = pytest.mark.engine
ASK: Any = [{"role": "user", "content": "Say hello and name one colour."}]


@pytest.fixture
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="small", messages=ASK, max_tokens=12, temperature=0)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content and choice.message.refusal is None
    assert choice.finish_reason in ("stop", "length") and choice.logprobs is None
    assert answer.usage and answer.usage.completion_tokens <= 12 and answer.usage.prompt_tokens > 10
    assert answer.model == "small" and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")


def test_a_stream_says_the_same_bit_by_bit(client: OpenAI) -> None:
    options = {"model": "small", "messages": ASK, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content and len(chunks) > 8
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(c.usage is None for c in chunks[:-1])


def test_several_choices_seeds_and_stop(client: OpenAI) -> None:
    def ask(n: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model="small", messages=ASK, max_tokens=10, temperature=1.2, n=n, seed=1
        )
        assert [c.index for c in answer.choices] == list(range(n))
        return [c.message.content for c in answer.choices]

    assert ask(1) == ask(1)
    assert len(set(ask(3))) > 1, "each has a seed of its own"
    full = client.chat.completions.create(model="small", messages=ASK, max_tokens=12, temperature=0)
    text = full.choices[0].message.content or ""
    cut = client.chat.completions.create(model="small", messages=ASK, max_tokens=12, temperature=0, stop=[text[4:7]])
    assert cut.choices[0].finish_reason == "stop" and text.startswith(cut.choices[0].message.content or "-")


def test_probabilities(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="small",
        messages=ASK,
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.content and len(logprobs.content) == 4
    assert "".join(t.token for t in logprobs.content) == answer.choices[0].message.content
    assert all(len(t.top_logprobs) == 2 and t.logprob == t.top_logprobs[0].logprob <= 0 for t in logprobs.content)


def test_json_in_the_form_that_was_asked_for(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="small",
        messages=ASK,
        max_tokens=60,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}},
    )
    said = json.loads(answer.choices[0].message.content or "")
    assert set(said) == {"colour", "count"} and said["colour"] in ("red", "blue") and isinstance(said["count"], int)


def test_text_completions(client: OpenAI) -> None:
    answer = client.completions.create(
        model="small", prompt=["One, two,", "A, b,"], max_tokens=6, temperature=0, logprobs=2
    )
    assert [c.index for c in answer.choices] == [0, 1] and all(c.text for c in answer.choices)
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.tokens and "".join(logprobs.tokens) == answer.choices[0].text
    echoed = client.completions.create(model="small", prompt="One, two,", max_tokens=6, temperature=0, echo=True)
    assert echoed.choices[0].text == "One, two," + answer.choices[0].text
    streamed = client.completions.create(model="small", prompt="One, two,", max_tokens=6, temperature=0, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == answer.choices[0].text


def test_embeddings(client: OpenAI) -> None:
    texts = ["A small boat on the sea", "A little ship on the ocean", "Quarterly tax accounting rules"]
    answer = client.embeddings.create(model="small", input=texts)
    boat, ship, tax = (item.embedding for item in answer.data)
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    assert dot(boat, boat) == pytest.approx(1, abs=1e-4) and dot(boat, ship) > dot(boat, tax)
    plain = client.embeddings.create(model="small", input=texts[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(boat, abs=1e-6)


def test_models(client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["small"] and client.models.retrieve("small").owned_by == "kvpsi"


def test_the_second_turn_does_not_read_the_first_again(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "Tell me about lighthouses. " * 20}]
    first = client.chat.completions.create(model="small", messages=messages, max_tokens=8, temperature=0)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content or ""},
        {"role": "user", "content": "And ships?"},
    ]
    second = client.chat.completions.create(model="small", messages=messages, max_tokens=8, temperature=0)
    assert first.usage and second.usage and second.usage.prompt_tokens_details
    # of a repeatable request's prompt the last 64 tokens are read in any case
    assert second.usage.prompt_tokens_details.cached_tokens == second.usage.prompt_tokens - 64
    third = client.chat.completions.create(model="small", messages=messages, max_tokens=8)
    assert third.usage and third.usage.prompt_tokens_details
    assert (third.usage.prompt_tokens_details.cached_tokens or 0) >= second.usage.prompt_tokens - 1


def test_who_hangs_up_frees_the_place(client: OpenAI, served: Served) -> None:
    stream = client.chat.completions.create(
        model="small", messages=ASK, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert served.get("/v1/kvpsi/status")["running"] == 1
    stream.close()
    client.chat.completions.create(model="small", messages=ASK, max_tokens=2)
    status = served.get("/v1/kvpsi/status")
    assert status["running"] == 0 and status["cancelled"] >= 1


def test_what_is_wrong_is_told_as_openai_does(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=ASK)
    assert unknown.value.code == "model_not_found" and "small" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="small", prompt="word " * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model="small", messages=ASK, max_tokens=-1)
    with pytest.raises(openai.BadRequestError, match="tools"):
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        client.chat.completions.create(model="small", messages=ASK, tools=[tool])


TOOLS_TEMPLATE = """{% if tools %}<|im_start|>system
Call a function with <tool_call>{"name": ..., "arguments": ...}</tool_call>. Functions: {{ tools | tojson }}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def refused(create: Any) -> int:
    """The status of a request that is not answered in time, 0 if it had none."""
    try:
        create(model="default", prompt="x")
    except openai.APITimeoutError:
        return 0
    except openai.RateLimitError as error:
        assert int(error.response.headers["retry-after"]) >= 1
        return error.response.status_code
    return 200


def test_tools_keys_and_a_full_queue(default_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text(TOOLS_TEMPLATE)
    options = ["-c", "1024", "-np", "1", "--queue", "1", "--chat-template", str(template), "--api-key", "secret"]
    with serving(default_model, tmp_path, *options) as served:
        url = f"{served.url}/v1"
        with (
            OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.models.list()
        with OpenAI(base_url=url, api_key="secret", max_retries=5, timeout=120) as client:
            weather = {
                "type": "function",
                "function": {
                    "name": "weather",
                    "parameters": {
                        "type": "object",
                        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
                        "required": ["city"],
                    },
                },
            }
            asked = {
                "model": "default",
                "messages": ASK,
                "tools": [weather],
                "tool_choice": "required",
                "max_tokens": 80,
            }
            answer = client.chat.completions.create(**asked, temperature=0)
            (call,) = answer.choices[0].message.tool_calls
            assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
            assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
            chunks = list(client.chat.completions.create(**asked, temperature=0, stream=True))
            (streamed,) = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
            assert streamed.function.arguments == call.function.arguments and streamed.index == 0
            follow_up = [
                *ASK,
                {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
                {"role": "tool", "tool_call_id": call.id, "content": "Sunny"},
            ]
            answer = client.chat.completions.create(model="default", messages=follow_up, max_tokens=4)
            assert answer.choices[0].message.content is not None
            slow = client.completions.create(
                model="default", prompt="Once", max_tokens=150, stream=True, extra_body={"ignore_eos": True}
            )
            next(iter(slow))
            with OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=0.5) as impatient:
                with pytest.raises(openai.APITimeoutError):  # it waits for its turn
                    impatient.completions.create(model="default", prompt="x")
                waiting = impatient.completions.create
                statuses = [refused(waiting) for _ in range(3)]
            assert all(status in (0, 429) for status in statuses)
            # the retries of the client outlast what fills the queue
            assert client.completions.create(model="default", prompt="Later", max_tokens=2).choices[0].text is not None
