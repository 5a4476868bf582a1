"""``kvpsi bench answers``: what one must give up at all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from kvpsi import models
from kvpsi.cli.bench.show import in_words, show, status_on_stderr, usable_folder
from kvpsi.cli.pull import progress_on_stderr
from kvpsi.units import parse_bytes


def answers(
    model: Annotated[str, typer.Option("--model", "-m", help="As for `kvpsi pull`.")] = "default",
    variants: Annotated[str, typer.Option("--variants", help="Whom to compare.")] = "ladder,streaming,prune",
    conversations: Annotated[int, typer.Option("--conversations", help="In turns.")] = 8,
    turns: Annotated[int, typer.Option("--turns", help="Of each; the first is a long text.")] = 4,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Tokens of each answer.")] = 24,
    ctx: Annotated[int, typer.Option("--ctx", "-c", help="Tokens of all conversations together.")] = 16384,
    memory: Annotated[str, typer.Option("--memory", help="Memory of the board, which has zram besides.")] = "600M",
    pressure_mib: Annotated[int, typer.Option("--pressure-mib", help="Most memory of the neighbour, in MiB.")] = 300,
    rounds: Annotated[int, typer.Option("--rounds", help="Each with other texts.")] = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of the texts.")] = 1,
    out_dir: Annotated[Path, typer.Option("--out-dir", help="Where the raw data goes.")] = Path("out/bench-answers"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Answers that are the same beside a neighbour as without one. Needs root."""
    from kvpsi.bench.answers.models import Variant
    from kvpsi.bench.answers.run import Plan, run
    from kvpsi.board import BoardSettings
    from kvpsi.hog import HogSettings

    names = cast("tuple[Variant, ...]", tuple(each.strip() for each in variants.split(",")))
    memory_bytes = parse_bytes(memory)
    with progress_on_stderr() as report:
        path = models.pull(model, report)
    plan = Plan(
        model=path,
        variants=names,
        n_conversations=conversations,
        n_turns=turns,
        n_predict=n_predict,
        n_ctx=ctx,
        board=BoardSettings(memory_bytes, swap="zram"),
        hog=HogSettings(pressure_mib << 20, 2 << 20, 0.5, 100 << 20),
        rounds=rounds,
        seed=seed,
    )
    with status_on_stderr() as say:
        document = run(plan, usable_folder(out_dir), say)
    show(document, as_json=json, words=map(in_words, document["runs"]))
