"""Fixtures of the tests with real vLLM: the default model as vLLM reads it, and what stock vLLM makes of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from asked import N_TOKENS, PROMPTS, STEERED, STEERED_OPTIONS, Stock
from convert import convert
from kvpsi import models
from kvpsi.board import BoardPlaces, find_places
from kvpsi.errors import EnvironmentProblem
from kvpsi.models.store import cache_dir
from served import Served, serving


@pytest.fixture(scope="session")
def board_places() -> BoardPlaces:
    """Skips, or fails with KVPSI_REQUIRE_PRESSURE=1, where no real memory pressure can be made."""
    try:
        return find_places()
    except EnvironmentProblem as why:
        if os.environ.get("KVPSI_REQUIRE_PRESSURE") == "1":
            pytest.fail(f"KVPSI_REQUIRE_PRESSURE=1 is set, but: {why}", pytrace=False)
        pytest.skip(f"NO PRESSURE TESTS HERE: {why}")


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
