"""One server for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.servers import Served, serving


@pytest.fixture(scope="module")
def served(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = ["-c", "4096", "--alias", "small", "-np", "4", "--log-requests", "--allow-origin", "http://page.example"]
    with serving(default_model, tmp_path_factory.mktemp("server"), *options) as it:
        yield it
