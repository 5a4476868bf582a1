"""Runs all checks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kvpsi.doctor import cpu, memory, pressure, runtime
from kvpsi.doctor.finding import Finding


def examine(root: Path = Path("/")) -> list[Finding]:
    """All findings, in the order in which they matter. ``root`` is where ``proc`` and ``sys`` lie."""
    return [
        *pressure.readings(root),
        pressure.triggers(root),
        memory.release(),
        memory.swap(root),
        memory.huge_pages(root),
        memory.locking(),
        *cpu.processors(root),
        *runtime.engines(),
        runtime.model_cache(),
        runtime.default_model(),
    ]


def can_govern(findings: Iterable[Finding]) -> bool:
    """Whether nothing that governing needs is missing."""
    return all(finding.status != "fail" for finding in findings)
