"""``kvpsi bench oom``: many short runs in which memory nearly runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from kvpsi import models
from kvpsi.cli.bench.show import show, status_on_stderr, usable_folder
from kvpsi.cli.pull import progress_on_stderr
from kvpsi.units import parse_bytes


def oom(
    model: Annotated[str, typer.Option("--model", "-m", help="As for `kvpsi pull`.")] = "default",
    runs: Annotated[int, typer.Option("--runs", help="How many scenarios.")] = 50,
    seed: Annotated[int, typer.Option("--seed", help="Which ones.")] = 1,
    memory: Annotated[str, typer.Option("--memory", help="Memory of the board.")] = "600M",
    variants: Annotated[str, typer.Option("--variants", help="What plays each: kvpsi, fixed.")] = "kvpsi,fixed",
    out_dir: Annotated[Path, typer.Option("--out-dir", help="Where the raw data goes.")] = Path("out/bench-oom"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Seeded scenarios with neighbours that grow, pulse and saw: is anybody killed? Needs root."""
    from kvpsi.bench.oom.play import Variant
    from kvpsi.bench.oom.run import Plan, run

    memory_bytes = parse_bytes(memory)
    with progress_on_stderr() as report:
        path = models.pull(model, report)
    chosen = cast("tuple[Variant, ...]", tuple(variants.split(",")))
    plan = Plan(path, runs, seed, memory_bytes, variants=chosen)
    with status_on_stderr() as say:
        document = run(plan, usable_folder(out_dir), say)
    words = (
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items())
        for name, figures in document["variants"].items()
    )
    show(document, as_json=json, words=words)
