"""``kvpsi pull``: fetch a model and check it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from kvpsi import models
from kvpsi.cli.output import print_json
from kvpsi.units import format_bytes

_NAMES = ", ".join(models.MODELS)


def pull(
    model: Annotated[
        str,
        typer.Argument(
            help=f"default, {_NAMES}, hf:owner/repo/file.gguf, owner/repo:file.gguf, the address of a file's page on "
            "the Hugging Face hub, or a local .gguf file"
        ),
    ] = "default",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Fetch a model into the cache, check it, and print its path."""
    with progress_on_stderr() as report:
        path = models.pull(model, report, verify=True)
    info = models.check_gguf(path)
    if not json:
        print(info.path)
        return
    print_json(
        {
            "path": str(info.path),
            "size_bytes": info.size_bytes,
            "name": info.name,
            "architecture": info.architecture,
            "context_length": info.context_length,
            "n_layer": info.n_layer,
            "sliding_window": info.sliding_window,
            "memory": info.memory,
        }
    )


@contextlib.contextmanager
def progress_on_stderr() -> Iterator[models.ReportProgress]:
    """A callback for ``models.pull`` that draws a bar on a terminal, and prints a line elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = None
        stage = ""

        def report(progress: models.Progress) -> None:
            nonlocal task, stage
            if progress.stage != stage:
                stage = progress.stage
                if not console.is_terminal and stage != "checking":
                    console.print(f"kvpsi: {_STAGES[stage]} ({format_bytes(progress.total_bytes)})", highlight=False)
                if task is not None:
                    bar.remove_task(task)
                task = bar.add_task(_STAGES[stage], total=progress.total_bytes)
            if task is not None:
                bar.update(task, completed=progress.done_bytes)

        yield report


_STAGES = {
    "waiting": "waiting for another pull",
    "downloading": "downloading the model",
    "checking": "checking the model",
}
