"""One fact about the machine and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
"""``warn``: works, with a limitation. ``fail``: kvpsi cannot govern memory here."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A check's result; ``fix`` is one sentence, empty when there is nothing to do."""

    name: str
    status: Status
    fact: str
    fix: str = ""
