"""JSON schemas become grammars; those that would make a huge one are refused before it is made."""

from __future__ import annotations

from typing import Any

import pytest
from llama_cpp import LlamaGrammar

from kvpsi.errors import UsageError
from kvpsi.serving.json_schema import MOST_REPETITIONS, gbnf_of


def test_a_schema_becomes_a_grammar_with_a_root() -> None:
    grammar = gbnf_of({"type": "object", "properties": {"name": {"type": "string", "maxLength": MOST_REPETITIONS}}})
    assert "root ::=" in grammar and "name" in grammar
    assert grammar.count("(") <= 4000, "the sampler takes no more groups"


@pytest.mark.parametrize(
    "pattern",
    [
        "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
        "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}$",
        "^[a-z0-9]{1,64}@[a-z0-9]{1,63}$",
    ],
)
def test_usual_patterns_can_be_followed(pattern: str) -> None:
    assert "root ::=" in gbnf_of({"type": "string", "pattern": pattern})


def test_classes_of_patterns_are_spelled_out() -> None:
    grammar = gbnf_of({"type": "string", "pattern": r"^\d{2}[\w.-]+ \\d$"})
    assert r"[0-9]" in grammar and "[A-Za-z0-9_.-]" in grammar
    assert LlamaGrammar.from_string(grammar, verbose=False)
    pattern_as_a_name = {"type": "object", "properties": {"pattern": {"type": "string", "pattern": r"^\d$"}}}
    assert r"\d" not in gbnf_of(pattern_as_a_name)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 1_000_000_000},
        {"type": "string", "minLength": 10**12},
        {"type": "object", "properties": {"list": {"type": "array", "items": {}, "maxItems": 1e400}}},
        {"anyOf": [{"type": "array", "items": {"type": "integer"}, "minItems": MOST_REPETITIONS + 1}]},
        {"type": "object", "properties": {f"p{n}": {"type": "string", "maxLength": 500} for n in range(10)}},
        {"type": "string", "pattern": "^a{1,99999999}$"},
        {"type": "object", "properties": {"default": {"type": "string", "maxLength": 99_999_999}}},
    ],
)
def test_what_would_be_written_out_too_often_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{MOST_REPETITIONS} are the most"):
        gbnf_of(schema)


def test_a_property_may_be_called_like_a_keyword() -> None:
    schema = {"type": "object", "properties": {"maxLength": {"type": "integer"}}, "required": ["maxLength"]}
    assert "maxLength" in gbnf_of(schema)
    assert "root ::=" in gbnf_of({"type": "string", "default": {"maxItems": 50_000}})


def test_what_the_converter_does_not_know_is_told() -> None:
    with pytest.raises(UsageError, match="cannot be followed"):
        gbnf_of({"$ref": "https://example.org/schema.json"})
