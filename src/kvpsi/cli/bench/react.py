"""``kvpsi bench react``: from the first stall to the first bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpsi import models
from kvpsi.cli.bench.show import in_words, show, status_on_stderr, usable_folder
from kvpsi.cli.pull import progress_on_stderr
from kvpsi.units import parse_bytes


def react(
    model: Annotated[str, typer.Option("--model", "-m", help="As for `kvpsi pull`.")] = "default",
    bursts: Annotated[int, typer.Option("--bursts", help="For each reactor, decoding and reading.")] = 10,
    memory: Annotated[str, typer.Option("--memory", help="Memory of the board, which has zram besides.")] = "600M",
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens that the model holds, of 16,384.")] = 8000,
    out_dir: Annotated[Path, typer.Option("--out-dir", help="Where the raw data goes.")] = Path("out/bench-react"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """From the first stall until memory goes back, beside a loop that follows avg10. Needs root."""
    from kvpsi.bench.react.run import Plan, run

    memory_bytes = parse_bytes(memory)
    with progress_on_stderr() as report:
        path = models.pull(model, report)
    with status_on_stderr() as say:
        document = run(Plan(path, bursts, n_tokens=tokens, memory_bytes=memory_bytes), usable_folder(out_dir), say)
    show(document, as_json=json, words=map(in_words, document["distributions"]))
