"""Fixtures of the tests with real vLLM: the default model as vLLM reads it, and what stock vLLM makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from convert import convert
from kvpsi import models
from kvpsi.models.store import cache_dir
from served import Served, serving

N_TOKENS = 100
STORIES = ["a keeper of a lighthouse", "a lost dog", "three bakers", "the last bus", "an old radio", "snow in May"]
PROMPTS = [
    f"Story {i}. This is a long and careful story about {STORIES[i % len(STORIES)]}, told on evening {i}. "
    + f"On that evening number {i}, the people of the town came together and listened to the wind. " * (4 + i % 7)
    for i in range(24)
]
STEERED = {"KVPSI_VLLM": "1"}
STEERED_OPTIONS = ("--scheduler-cls", "steered.SteeredScheduler")


@dataclass(frozen=True)
class Stock:
    """What stock vLLM answers, and its memory when it has just started."""

    texts: dict[str, str]
    idle_rss_bytes: int


@pytest.fixture(scope="session")
def model() -> Path:
    """The default model; converted the first time, and kept beside the others."""
    gguf = models.default_model_path()
    folder = cache_dir() / "vllm" / gguf.stem
    convert(gguf, folder)
    return folder


@pytest.fixture(scope="session")
def stock(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """Answers without kvpsi."""
    with serving(model, tmp_path_factory.mktemp("stock")) as served:
        rss_bytes = served.rss_bytes()
        return Stock(dict(zip(PROMPTS, served.answers(PROMPTS, N_TOKENS), strict=True)), rss_bytes)


@pytest.fixture(scope="module")
def steered(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose limit is what the test says."""
    folder = tmp_path_factory.mktemp("steered")
    with serving(model, folder, *STEERED_OPTIONS, environment=STEERED) as served:
        yield served
