"""Turns messages into a prompt with the model's own template, and an answer into tool calls."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from llama_cpp.llama_chat_format import CHATML_CHAT_TEMPLATE, Jinja2ChatFormatter

from kvpsi.errors import UsageError
from kvpsi.serving.text import overlap

_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
_TAG = "<tool_call>"
_NAMED_KEYS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model wants called; ``arguments`` is a JSON object as text."""

    id: str
    name: str
    arguments: str


class ChatTemplate:
    """The template of a model, or ChatML where it has none.

    Args:
        template: Jinja2, as the model's file has it.
        eos, bos: the texts of the tokens that end and begin a text.

    Raises:
        UsageError: the template is not valid.
    """

    def __init__(self, template: str | None, *, eos: str, bos: str) -> None:
        self.text = template or CHATML_CHAT_TEMPLATE
        try:
            self._format = Jinja2ChatFormatter(template=self.text, eos_token=eos, bos_token=bos)
        except jinja2.TemplateError as error:
            raise UsageError(f"The chat template is not valid ({error}); give another with --chat-template.") from error

    @property
    def knows_tools(self) -> bool:
        """Whether the template tells the model of tools."""
        return "tools" in self.text

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The prompt, up to where the answer begins.

        Raises:
            UsageError: the template refuses these messages.
        """
        try:
            return str(
                self._format(messages=[_plain(m) for m in messages], tools=list(tools) if tools else None).prompt
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UsageError(f"The model's chat template refuses these messages: {error}.") from error


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: the text of its parts in one string, arguments of calls as objects."""
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise UsageError("This model reads text only; leave out images, sound and files.")
        plain["content"] = "".join(part["text"] for part in content)
    elif content is None:
        plain["content"] = ""
    calls = plain.get("tool_calls")
    if calls:
        plain["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _object(call["function"]["arguments"])}}
            for call in calls
        ]
    return plain


def _object(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


class ToolStream:
    """An answer that may call tools, as it comes: text is shown at once, what may be a call is held back."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._held = ""
        self._shown = False
        self._may_call = False

    def feed(self, text: str) -> str:
        """What can be shown now."""
        self._held += text
        begins = self._held.lstrip()[:1]
        if self._may_call or (not self._shown and (not begins or begins in "{[")):
            self._may_call = bool(begins)
            return ""
        at = self._held.find(_TAG)
        self._may_call = at >= 0
        end = at if self._may_call else len(self._held) - overlap(self._held, _TAG)
        shown, self._held = self._held[:end], self._held[end:]
        self._shown = self._shown or bool(shown)
        return shown

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What is left to show, and the calls."""
        return tool_calls_in(self._held, self._names)


def tool_calls_in(text: str, names: Sequence[str]) -> tuple[str, list[ToolCall]]:
    """What an answer says, and the calls in it.

    Two forms are understood: objects in ``<tool_call>`` tags, and an answer that is such an object, or a list of them,
    and nothing else. An object has ``name`` and ``arguments`` (or ``parameters``).

    Args:
        text: the whole answer.
        names: of the tools that there are; anything else is text.
    """
    tagged = [_call(match, names) for match in _TOOL_CALL.findall(text)]
    if tagged and all(tagged):
        return _TOOL_CALL.sub("", text).strip(), [call for call in tagged if call]
    try:
        whole = json.loads(text)
    except ValueError:
        return text, []
    calls = [_call(json.dumps(each), names) for each in (whole if isinstance(whole, list) else [whole])]
    if calls and all(calls):
        return "", [call for call in calls if call]
    return text, []


def _call(text: str, names: Sequence[str]) -> ToolCall | None:
    try:
        said = json.loads(text)
    except ValueError:
        return None
    if not isinstance(said, dict) or said.get("name") not in names:
        return None
    arguments: Any = next((said[key] for key in _NAMED_KEYS if key in said), {})
    as_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", said["name"], as_text)


def schema_of_a_call(tools: Sequence[Mapping[str, Any]], name: str | None = None) -> dict[str, Any]:
    """The JSON schema of a call of one of the tools, or of the one that is named.

    Raises:
        UsageError: there is no tool of that name.
    """
    functions = [tool["function"] for tool in tools if name is None or tool["function"]["name"] == name]
    if not functions:
        raise UsageError(f"There is no tool called {name}; name one of those in `tools`.")
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
        }
        for function in functions
    ]
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"oneOf": calls}
    definitions: dict[str, Any] = {}
    for function in functions:  # references in the parameters are to the root of the schema
        definitions |= (function.get("parameters") or {}).get("$defs", {})
    return {**schema, "$defs": definitions} if definitions else schema
