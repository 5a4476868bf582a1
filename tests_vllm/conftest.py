"""Fixtures of the tests with real vLLM: the default model as vLLM reads it, and what stock vLLM makes of it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from asked import N_TOKENS, PROMPTS, STEERED, Stock, with_options
from kvpsi import models
from kvpsi.bench.vllm.model import folder_of
from kvpsi.bench.vllm.server import GOVERNED, Setting
from kvpsi.board import BoardPlaces, find_places
from kvpsi.errors import EnvironmentProblem
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
def setting() -> Setting:
    """The default model; converted the first time, and kept beside the others."""
    return Setting(folder_of(models.default_model_path()))


@pytest.fixture(scope="session")
def stock(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """Answers without kvpsi."""
    with serving(setting, tmp_path_factory.mktemp("stock")) as served:
        rss_bytes = served.rss_bytes()
        return Stock(dict(zip(PROMPTS, served.answers(PROMPTS, N_TOKENS), strict=True)), rss_bytes)


@pytest.fixture(scope="module")
def steered(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose limit is what the test says."""
    with serving(with_options(setting, *STEERED), tmp_path_factory.mktemp("steered"), GOVERNED) as served:
        yield served
