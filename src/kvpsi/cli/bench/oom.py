"""``kvpsi bench oom``: many short runs in which memory nearly runs out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from kvpsi import models
from kvpsi.cli.bench.show import print_figures, status_on_stderr
from kvpsi.cli.output import one_line, print_json
from kvpsi.cli.pull import progress_on_stderr
from kvpsi.units import parse_bytes

_INTERRUPTED = 130


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
        document = run(plan, out_dir, say)
    for problem in cast("list[str]", document["problems"]):
        print(f"kvpsi: {one_line(problem)}", file=sys.stderr)
    if json:
        print_json(document)
    else:
        for name, figures in cast("dict[str, dict[str, object]]", document["variants"]).items():
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
        print_figures(document)
        print(f"Raw data is in {out_dir}.")
    if document["interrupted"]:
        raise typer.Exit(_INTERRUPTED)
