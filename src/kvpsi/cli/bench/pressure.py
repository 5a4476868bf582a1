"""``kvpsi bench pressure``: a model and a neighbour on one small board, in several variants."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from kvpsi import models
from kvpsi.cli.bench.show import show, status_on_stderr, usable_folder
from kvpsi.cli.pull import progress_on_stderr
from kvpsi.units import parse_bytes

_MIB = 1 << 20


def pressure(
    model: Annotated[str, typer.Option("--model", "-m", help="As for `kvpsi pull`.")] = "default",
    memory: Annotated[str, typer.Option("--memory", help="Memory of the board.")] = "600M",
    swap: Annotated[str, typer.Option("--swap", help="Swap of the board: zram or none.")] = "zram",
    ctx: Annotated[int, typer.Option("--ctx", "-c", help="Context in tokens.")] = 16384,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="What the model holds at first.")] = 6000,
    calm_tokens: Annotated[int, typer.Option("--calm-tokens", help="Generated before the neighbour begins.")] = 50,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Tokens generated beside the neighbour.")] = 200,
    read_tokens: Annotated[int, typer.Option("--read-tokens", help="Read beside the neighbour, then alone.")] = 1024,
    threads: Annotated[int, typer.Option("--threads", "-t", help="Threads of the model.")] = 1,
    keep: Annotated[int, typer.Option("--keep", help="First tokens that are never forgotten.")] = 16,
    tail: Annotated[int, typer.Option("--tail", help="Last tokens that are never forgotten.")] = 256,
    min_prune: Annotated[int, typer.Option("--min-prune", help="Least tokens forgotten at once.")] = 64,
    hog_mib: Annotated[int, typer.Option("--pressure-mib", help="Most memory of the neighbour, in MiB.")] = 300,
    step_mib: Annotated[int, typer.Option("--pressure-step-mib", help="What it takes at once, in MiB.")] = 2,
    warmup_s: Annotated[float, typer.Option("--pressure-warmup-s", help="Seconds before it begins.")] = 0.5,
    rate_mib_s: Annotated[float, typer.Option("--rate-mib-s", help="How fast it grows, in MiB a second.")] = 100.0,
    order: Annotated[str, typer.Option("--variant-order", help="What runs, in the first order.")] = (
        "calm,fixed,prune,kvpsi"
    ),
    rounds: Annotated[int, typer.Option("--rounds", help="How often each runs; every second time backwards.")] = 2,
    cooldown_s: Annotated[float, typer.Option("--variant-cooldown-s", help="Pause between two runs.")] = 5.0,
    limit_s: Annotated[float, typer.Option("--limit-s", help="Longest generating of one run under pressure.")] = 120.0,
    threshold: Annotated[float, typer.Option("--prune-threshold", help="avg10 from which prune drops tokens.")] = 0.1,
    out_dir: Annotated[Path, typer.Option("--out-dir", help="Where tables, raw data and plots go.")] = Path(
        "out/bench-pressure"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Stock, pruned and governed beside a growing neighbour: who lives, how fast, with how much memory. Needs root."""
    from kvpsi.bench.pressure import report as reporting
    from kvpsi.bench.pressure.plan import Plan, Variant
    from kvpsi.bench.pressure.run import run
    from kvpsi.board import BoardSettings
    from kvpsi.board.board import SwapKind
    from kvpsi.hog import HogSettings

    board = BoardSettings(parse_bytes(memory), cast("SwapKind", swap))
    hog = HogSettings(hog_mib * _MIB, step_mib * _MIB, warmup_s, rate_mib_s * _MIB)
    with progress_on_stderr() as report:
        path = models.pull(model, report)
    plan = Plan(
        model=path,
        board=board,
        hog=hog,
        n_ctx=ctx,
        prompt_tokens=prompt_tokens,
        calm_tokens=calm_tokens,
        n_predict=n_predict,
        read_tokens=read_tokens,
        keep=keep,
        tail=tail,
        min_prune=min_prune,
        n_threads=threads,
        variants=cast("tuple[Variant, ...]", tuple(order.split(","))),
        rounds=rounds,
        cooldown_s=cooldown_s,
        limit_s=limit_s,
        prune_threshold=threshold,
    )
    with status_on_stderr() as say:
        document = run(plan, usable_folder(out_dir), say)
    rows = [reporting.Row(**row) for row in document["runs"]]
    where = [f"Raw data and plots are in {out_dir}."] if document["raw"] else []
    show(document, as_json=json, words=[reporting.markdown(rows), *where])
