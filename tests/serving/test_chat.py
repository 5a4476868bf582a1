"""Templates and tool calls, without a model."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpsi.errors import UsageError
from kvpsi.serving.chat import ChatTemplate, ToolStream, schema_of_a_call, tool_calls_in

TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "time"}},
]


def test_parts_of_text_are_joined_and_arguments_are_objects() -> None:
    calls = "{% for c in m.tool_calls %}{{ c.function.arguments.a }}{% endfor %}"
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}" + calls + ";{% endfor %}"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 5}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    assert ChatTemplate(template, eos="", bos="").prompt(messages) == "user:AB;assistant:5;"


def test_a_model_without_a_template_gets_chatml() -> None:
    chat = ChatTemplate(None, eos="", bos="")
    assert "<|im_start|>user\nHi<|im_end|>" in chat.prompt([{"role": "user", "content": "Hi"}])
    assert not chat.knows_tools


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('no') }}", "{{ messages[5].content }}{{ 1/0 }}"])
def test_templates_that_fail_are_told_in_a_sentence(template: str) -> None:
    with pytest.raises(UsageError, match="template"):
        ChatTemplate(template, eos="", bos="").prompt([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("text", "rest", "calls"),
    [
        (
            '<tool_call>{"name": "weather", "arguments": {"a": 1}}</tool_call>',
            "",
            [("weather", {"a": 1})],
        ),
        ('Well. <tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>', "Well.", [("time", {})]),
        ('{"name": "weather", "parameters": {"city": "Oslo"}}', "", [("weather", {"city": "Oslo"})]),
        ('[{"name": "time"}, {"name": "time"}]', "", [("time", {}), ("time", {})]),
        ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
        ("<tool_call>{broken}</tool_call>", "<tool_call>{broken}</tool_call>", []),
        ("Just text", "Just text", []),
        ("[]", "[]", []),
        ("7", "7", []),
    ],
)
def test_calls_are_found(text: str, rest: str, calls: list[tuple[str, object]]) -> None:
    said, found = tool_calls_in(text, ["weather", "time"])
    assert said == rest and [(c.name, json.loads(c.arguments)) for c in found] == calls
    assert len({c.id for c in found}) == len(found)


@given(st.lists(st.integers(0, 60), max_size=8))
@pytest.mark.parametrize(
    ("text", "shown", "n_calls"),
    [
        ("Just <b>text</b> with < and <tool", "Just <b>text</b> with < and <tool", 0),
        ('Well. <tool_call>{"name": "time", "arguments": {}}</tool_call>', "Well. ", 1),
        (' {"name": "time", "arguments": {}}', "", 1),
        ("[1, 2] is a list", "[1, 2] is a list", 0),
        ("<tool_call>{broken}</tool_call> so", "<tool_call>{broken}</tool_call> so", 0),
    ],
)
def test_a_stream_shows_text_and_holds_calls_back(text: str, shown: str, n_calls: int, cuts: list[int]) -> None:
    stream = ToolStream(["time"])
    ends = sorted({*(min(c, len(text)) for c in cuts), len(text)})
    told = "".join(stream.feed(text[a:b]) for a, b in zip([0, *ends], ends, strict=False))
    rest, calls = stream.finish()
    assert (told + rest, len(calls)) == (shown, n_calls)


def test_text_is_not_held_back_without_need() -> None:
    stream = ToolStream(["time"])
    assert stream.feed("Hello") == "Hello" and stream.feed(" <") == " " and stream.feed("b>") == "<b>"


def test_a_call_has_a_schema() -> None:
    assert schema_of_a_call(TOOLS, "time")["properties"]["name"] == {"const": "time"}
    assert len(schema_of_a_call(TOOLS)["oneOf"]) == 2
    with pytest.raises(UsageError, match="no tool called missing"):
        schema_of_a_call(TOOLS, "missing")
