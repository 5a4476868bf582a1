"""``kvpsi bench sessions``: conversations that come back, and the memory that servers hold for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpsi import models
from kvpsi.cli.bench.show import in_words, show, status_on_stderr, usable_folder
from kvpsi.cli.pull import progress_on_stderr
from kvpsi.units import parse_bytes


def sessions(
    model: Annotated[str, typer.Option("--model", "-m", help="As for `kvpsi pull`.")] = "default",
    servers: Annotated[str, typer.Option("--servers", help="Whom to compare.")] = "kvpsi,xllamacpp",
    conversations: Annotated[int, typer.Option("--conversations", help="That come back.")] = 5,
    history_tokens: Annotated[int, typer.Option("--history-tokens", help="Of the first turn of each.")] = 2000,
    requests: Annotated[int, typer.Option("--requests", help="That do not come back.")] = 200,
    request_tokens: Annotated[int, typer.Option("--request-tokens", help="Of each of these.")] = 200,
    memory: Annotated[str, typer.Option("--memory", help="Memory of the board.")] = "2G",
    pressure_mib: Annotated[int, typer.Option("--pressure-mib", help="What the neighbour grows to.")] = 1600,
    ctx: Annotated[int, typer.Option("--ctx", "-c", help="Tokens of context in all.")] = 16384,
    threads: Annotated[int, typer.Option("--threads", "-t", help="Of each server, 0: as many as can run.")] = 0,
    spill_max: Annotated[str, typer.Option("--spill-max", help="Of kvpsi, as for `kvpsi serve`.")] = "4G",
    seed: Annotated[int, typer.Option("--seed", help="Of the texts.")] = 1,
    out_dir: Annotated[Path, typer.Option("--out-dir", help="Where the raw data goes.")] = Path("out/bench-sessions"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Conversations that come back, and the memory that is held for them, beside llama.cpp's server. Needs root."""
    from kvpsi.bench.servers import names_in
    from kvpsi.bench.sessions.play import Plan
    from kvpsi.bench.sessions.run import run
    from kvpsi.hog import HogSettings

    memory_bytes, names = parse_bytes(memory), names_in(servers)
    with progress_on_stderr() as report:
        path = models.pull(model, report)
    plan = Plan(
        model=path,
        servers=names,
        conversations=conversations,
        history_tokens=history_tokens,
        requests=requests,
        request_tokens=request_tokens,
        memory_bytes=memory_bytes,
        hog=HogSettings(pressure_mib << 20, rate_bytes_s=200 << 20, hold_s=5.0),
        n_ctx=ctx,
        n_threads=threads,
        spill_max=spill_max,
        seed=seed,
    )
    with status_on_stderr() as say:
        document = run(plan, usable_folder(out_dir), say)
    show(document, as_json=json, words=map(in_words, document["servers"]))
