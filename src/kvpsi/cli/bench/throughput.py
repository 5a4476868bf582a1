"""``kvpsi bench throughput``: tokens a second over HTTP, beside other servers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpsi import models
from kvpsi.cli.bench.show import in_words, show, status_on_stderr, usable_folder
from kvpsi.cli.pull import progress_on_stderr
from kvpsi.cli.settings import levels_in


def throughput(
    model: Annotated[str, typer.Option("--model", "-m", help="As for `kvpsi pull`.")] = "default",
    servers: Annotated[str, typer.Option("--servers", help="Whom to compare.")] = "kvpsi,xllamacpp,llama-cpp-python",
    levels: Annotated[str, typer.Option("--levels", help="Clients at once.")] = "1,2,4,8",
    rounds: Annotated[int, typer.Option("--rounds", help="How often; every second time backwards.")] = 3,
    requests: Annotated[int, typer.Option("--requests", help="Of each client in a round.")] = 4,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Tokens of an answer, at most.")] = 64,
    ctx: Annotated[int, typer.Option("--ctx", "-c", help="Tokens of context in all.")] = 16384,
    threads: Annotated[int, typer.Option("--threads", "-t", help="Of each server, 0: as many as can run.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the prompts.")] = 1,
    out_dir: Annotated[Path, typer.Option("--out-dir", help="Where the raw data goes.")] = Path("out/bench-throughput"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Tokens a second and waiting times of `kvpsi serve` beside other servers of the same model."""
    from kvpsi.bench.servers import names_in
    from kvpsi.bench.throughput.run import Plan, run

    with progress_on_stderr() as report:
        path = models.pull(model, report)
    numbers = levels_in(levels, "1,2,4,8")
    plan = Plan(
        model=path,
        servers=names_in(servers),
        levels=numbers,
        rounds=rounds,
        requests=requests,
        n_predict=n_predict,
        n_ctx=ctx,
        n_threads=threads,
        seed=seed,
    )
    with status_on_stderr() as say:
        document = run(plan, usable_folder(out_dir), say)
    show(document, as_json=json, words=map(in_words, document["levels"]))
