"""``kvpsi bench …``: the measurements behind every claim."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from kvpsi import models
from kvpsi.cli.output import print_json
from kvpsi.cli.pull import progress_on_stderr

app = typer.Typer(help="Measure what kvpsi claims, on this machine.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command()
def elastic(
    model: Annotated[str, typer.Option("--model", "-m", help="As for `kvpsi pull`.")] = "default",
    ctx: Annotated[int, typer.Option("--ctx", "-c", help="Context in tokens.")] = 16384,
    threads: Annotated[int, typer.Option("--threads", "-t", help="Threads, 0: as many as can run.")] = 0,
    kv_type: Annotated[str, typer.Option("--kv-type", help="Type of the cache: f16 or q8_0.")] = "f16",
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds of decoding.")] = 60,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Stock llama-cpp-python beside the elastic cache: idle memory, decode speed, trims, the same logits."""
    from kvpsi.bench import elastic as bench
    from kvpsi.engines.loading import show_errors_only

    show_errors_only()
    with progress_on_stderr() as report:
        path = models.pull(model, report)
    plan = bench.Plan(path, n_ctx=ctx, n_threads=threads, kv_type=kv_type, rounds=rounds)
    with _status_on_stderr() as say:
        document = bench.run(plan, say)
    if json:
        print_json(document)
    else:
        _print_figures(document)


@contextlib.contextmanager
def _status_on_stderr() -> Iterator[Callable[[str], None]]:
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Stages()
        return
    with console.status("starting") as status:
        yield status.update


class _Stages:
    """One line for each stage, where there is no terminal on which a line could change."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, text: str) -> None:
        stage = text.partition(",")[0]
        if stage != self._stage:
            self._stage = stage
            print(f"kvpsi: {stage}", file=sys.stderr, flush=True)


def _print_figures(document: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", "unit", "target", "met")
    figures = document["figures"]
    assert isinstance(figures, list)
    for f in figures:
        value = f["value"] if isinstance(f["value"], bool) else f"{f['value']:.3f}"
        met = {True: "yes", False: "no", None: ""}[f["met"]]
        table.add_row(f["name"], str(value), f["unit"], f["target"] or "", met)
    Console().print(table)
