"""A CSV file that grows by a line with each run."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path


class Table:
    """Each line is written when it is known; a disk that is full ends the writing, not the bench.

    ``problem`` then is a sentence about it, and None else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self.problem: str | None = None

    @property
    def paths(self) -> list[str]:
        """The file, if anything is in it."""
        return [str(self.path)] if self.rows else []

    @property
    def problems(self) -> list[str]:
        """The problem, if there is one."""
        return [self.problem] if self.problem else []

    def add(self, row: Mapping[str, object]) -> None:
        """Write one more line; where that fails, note it once and go on without."""
        if self.problem:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a" if self.rows else "w", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                if not self.rows:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            rest = "the runs from then on are missing in it" if self.rows else "there is no such file"
            self.problem = f"{self.path} cannot be written ({error.strerror}), so {rest}."
        else:
            self.rows += 1
