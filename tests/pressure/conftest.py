from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

TREES = Path(__file__).parent / "trees"


@pytest.fixture
def copy_tree(tmp_path: Path) -> Callable[[str], Path]:
    """A private copy of one recorded system, to change or break."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(TREES / name, tmp_path / name))

    return copy
