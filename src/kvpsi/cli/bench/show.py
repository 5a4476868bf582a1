"""What all benches show: the stage that they are in, and their figures."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from kvpsi.cli.output import INTERRUPTED, one_line, print_json
from kvpsi.errors import UsageError


@contextlib.contextmanager
def status_on_stderr() -> Iterator[Callable[[str], None]]:
    """A line that changes on a terminal, one line for each stage elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Stages()
        return
    with console.status("starting") as status:
        yield status.update


class _Stages:
    """A stage is what stands before the first comma; what follows tells how far it is."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, text: str) -> None:
        stage = text.partition(",")[0]
        if stage != self._stage:
            self._stage = stage
            print(f"kvpsi: {stage}", file=sys.stderr, flush=True)


def usable_folder(out_dir: Path) -> Path:
    """The folder, made if it was not there.

    Raises:
        UsageError: nothing can be written there, which one had better know before the bench than after it.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out_dir):
            return out_dir
    except OSError as error:
        raise UsageError(
            f"Nothing can be written to {out_dir} ({error.strerror}); choose another folder with --out-dir."
        ) from error


def show(document: dict[str, Any], *, as_json: bool, words: Iterable[str] = ()) -> None:
    """Print what a bench found, as JSON or as lines and a table; what went wrong beside it on standard error.

    Raises:
        typer.Exit: it was interrupted (status 130).
    """
    for problem in document.get("problems", ()):
        print(f"kvpsi: {one_line(problem)}", file=sys.stderr)
    if document.get("interrupted"):
        print("kvpsi: interrupted; what was measured until then follows.", file=sys.stderr)
    if as_json:
        print_json(document)
    else:
        for line in words:
            print(line)
        _print_figures(document)
    if document.get("interrupted"):
        raise typer.Exit(INTERRUPTED)


def _print_figures(document: dict[str, Any]) -> None:
    """The figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", "unit", "target", "met")
    for f in document["figures"]:
        value = f["value"] if isinstance(f["value"], bool) else f"{f['value']:.3f}"
        met = {True: "yes", False: "no", None: ""}[f["met"]]
        table.add_row(f["name"], str(value), f["unit"], f["target"] or "", met)
    Console().print(table)


def in_words(row: Mapping[str, object]) -> str:
    """A line of a table."""
    return ", ".join(f"{name} {_short(value)}" for name, value in row.items())


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
