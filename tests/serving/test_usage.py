"""What is told of the tokens of an answer."""

from __future__ import annotations

from kvpsi.serving.api.answers import usage_of
from kvpsi.serving.api.completions import _usage
from kvpsi.serving.api.schema import CompletionRequest
from kvpsi.serving.request import Finished


def end(generated: int, *, cached: int = 0, forgotten: int = 0) -> Finished:
    return Finished("stop", 10, generated, cached, forgotten, 0.0)


def test_the_prompt_of_several_choices_counts_once() -> None:
    usage = usage_of([end(3, cached=9), end(4, cached=5)])
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (10, 7, 17)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 5} and "kvpsi_forgotten_tokens" not in usage


def test_what_was_forgotten_is_told() -> None:
    assert usage_of([end(3, forgotten=64), end(4)])["kvpsi_forgotten_tokens"] == 64
    usage = _usage(CompletionRequest(prompt=["a", "b"]), [end(3, forgotten=64), end(4, forgotten=1)])
    assert usage["kvpsi_forgotten_tokens"] == 65 and usage["prompt_tokens"] == 20
    assert "kvpsi_forgotten_tokens" not in _usage(CompletionRequest(prompt="a"), [end(3)])
