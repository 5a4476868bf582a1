"""Turns a JSON schema into a grammar, with llama-cpp-python's converter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from llama_cpp.llama_grammar import json_schema_to_gbnf

from kvpsi.errors import UsageError

MOST_REPETITIONS = 2_000
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
_QUANTIFIER = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")


def gbnf_of(schema: Mapping[str, Any]) -> str:
    """The grammar of what follows a schema.

    Raises:
        UsageError: it repeats something so often that the grammar would be huge, as the converter writes each
            repetition out; or the converter does not understand it.
    """
    try:
        for name, times in _repetitions(schema):
            if times > MOST_REPETITIONS:
                raise UsageError(
                    f"The JSON schema's {name} repeats something {times:.0f} times; {MOST_REPETITIONS} are the most "
                    "that can be followed: make it smaller, or leave it out."
                )
        return str(json_schema_to_gbnf(json.dumps(schema)))
    except UsageError:
        raise
    except Exception as error:  # whatever the converter stumbles over
        raise UsageError(f"The JSON schema cannot be followed: {error}.") from error


def _repetitions(node: Any) -> Iterator[tuple[str, float]]:
    """Each keyword that repeats something, and how often."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            if name in _COUNTS and isinstance(value, int | float):
                yield name, value
            elif name == "pattern" and isinstance(value, str):
                yield name, _repetitions_of(value)
            else:
                yield from _repetitions(value)
    elif isinstance(node, list):
        for each in node:
            yield from _repetitions(each)


def _repetitions_of(pattern: str) -> float:
    """How often a pattern's innermost part is written out at most: quantifiers may stand within each other."""
    counts = [max(int(n or 1) for n in found.groups("1")) for found in _QUANTIFIER.finditer(pattern)]
    return math.prod(map(float, counts))
