"""Turns a JSON schema into a grammar, with llama-cpp-python's converter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from llama_cpp.llama_grammar import json_schema_to_gbnf

from kvpsi.errors import UsageError

MOST_REPETITIONS = 3_000
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_VALUES = ("const", "enum", "default", "examples")
_CLASSES = {r"\d": "0-9", r"\w": "A-Za-z0-9_", r"\s": " "}  # JSON has other blanks escaped
_PART_OF_A_PATTERN = re.compile(r"\\.|.", re.DOTALL)
_QUANTIFIER = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")


def gbnf_of(schema: Mapping[str, Any]) -> str:
    """The grammar of what follows a schema.

    Raises:
        UsageError: all that it repeats is so much that the grammar would be huge, as the converter writes each
            repetition out; or the converter does not understand it.
    """
    try:
        times = sum(_repetitions(schema))
        if times > MOST_REPETITIONS:
            raise UsageError(
                f"The JSON schema repeats something {times:.0f} times in all (minLength, maxLength, minItems, maxItems "
                f"and quantifiers of a pattern); {MOST_REPETITIONS} are the most: make them smaller, or leave them out."
            )
        return str(json_schema_to_gbnf(json.dumps(_spelled_out(schema))))
    except UsageError:
        raise
    except Exception as error:  # whatever the converter stumbles over
        raise UsageError(f"The JSON schema cannot be followed: {error}.") from error


def _spelled_out(node: Any) -> Any:
    r"""The same schema with \d, \w and \s in its patterns spelled out, which the converter does not know."""
    if isinstance(node, Mapping):
        return {
            name: value
            if name in _VALUES
            else _without_classes(value)
            if name == "pattern" and isinstance(value, str)
            else _spelled_out(value)
            for name, value in node.items()
        }
    return [_spelled_out(each) for each in node] if isinstance(node, list) else node


def _without_classes(pattern: str) -> str:
    written, inside = [], False
    for part in _PART_OF_A_PATTERN.findall(pattern):
        inside = part == "[" or (inside and part != "]")
        among = _CLASSES.get(part)
        written.append(part if among is None else among if inside else f"[{among}]")
    return "".join(written)


def _repetitions(node: Any) -> Iterator[float]:
    """How often each keyword and quantifier repeats something; what repeats is a rule of its own to the converter."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name in _COUNTS and isinstance(value, int | float):
                yield value
            elif name == "pattern" and isinstance(value, str):
                yield from (max(int(n or 1) for n in found.groups("1")) for found in _QUANTIFIER.finditer(value))
            elif name == "properties" and isinstance(value, Mapping):  # whose names are not keywords
                yield from _repetitions(list(value.values()))
            elif name not in _VALUES:
                yield from _repetitions(value)
    elif isinstance(node, list):
        for each in node:
            yield from _repetitions(each)
