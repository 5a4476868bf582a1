"""``kvpsi doctor``: what this machine can do, and how to fix what it cannot."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from kvpsi import __version__
from kvpsi.cli.output import one_line, print_json

if TYPE_CHECKING:
    from kvpsi.doctor import Finding


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check this machine; exit status 1 when memory cannot be governed here."""
    from kvpsi.doctor import can_govern, examine

    findings = examine()
    governable = can_govern(findings)
    if json:
        print_json(
            {
                "version": __version__,
                "can_govern": governable,
                "findings": [dataclasses.asdict(finding) for finding in findings],
            }
        )
    else:
        _print_table(findings)
        print("Memory can be governed here." if governable else "Memory cannot be governed here.")
    if not governable:
        raise typer.Exit(1)


def _print_table(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.status:<4}  {finding.name:<{width}}  {one_line(finding.fact)}")
        if finding.fix:
            print(f"{'':<6}{'':<{width}}  → {one_line(finding.fix)}")
