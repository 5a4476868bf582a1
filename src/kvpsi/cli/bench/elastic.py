"""``kvpsi bench elastic``: stock llama-cpp-python beside the elastic cache."""

from __future__ import annotations

from typing import Annotated

import typer

from kvpsi import models
from kvpsi.cli.bench.show import show, status_on_stderr
from kvpsi.cli.pull import progress_on_stderr


def elastic(
    model: Annotated[str, typer.Option("--model", "-m", help="As for `kvpsi pull`.")] = "default",
    ctx: Annotated[int, typer.Option("--ctx", "-c", help="Context in tokens.")] = 16384,
    threads: Annotated[int, typer.Option("--threads", "-t", help="Threads, 0: as many as can run.")] = 0,
    kv_type: Annotated[str, typer.Option("--kv-type", help="Type of the cache: f16 or q8_0.")] = "f16",
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds of decoding.")] = 60,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Stock llama-cpp-python beside the elastic cache: idle memory, decode speed, trims, the same logits."""
    from kvpsi.bench.elastic.run import Plan, run
    from kvpsi.engines.loading import show_errors_only

    show_errors_only()
    with progress_on_stderr() as report:
        path = models.pull(model, report)
    plan = Plan(path, n_ctx=ctx, n_threads=threads, kv_type=kv_type, rounds=rounds)
    with status_on_stderr() as say:
        document = run(plan, say)
    show(document, as_json=json)
