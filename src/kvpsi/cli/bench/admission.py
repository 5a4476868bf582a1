"""``kvpsi bench admission``: tail latency under CPU pressure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from kvpsi import models
from kvpsi.bench.admission.plan import VARIANTS, Part, Plan, Scenario
from kvpsi.cli.bench.show import in_words, show, status_on_stderr, usable_folder
from kvpsi.cli.pull import progress_on_stderr
from kvpsi.cli.settings import levels_in
from kvpsi.errors import UsageError

_VARIANTS = ",".join(VARIANTS)
_PARTS = ",".join(get_args(Part))


def admission(
    model: Annotated[str, typer.Option("--model", "-m", help="As for `kvpsi pull`.")] = "default",
    scenarios: Annotated[str, typer.Option("--scenarios", help="quota: half a CPU; neighbours: busy ones.")] = (
        "quota,neighbours"
    ),
    variants: Annotated[str, typer.Option("--variants", help="Whom to compare.")] = _VARIANTS,
    parts: Annotated[str, typer.Option("--parts", help="What to play.")] = _PARTS,
    rounds: Annotated[int, typer.Option("--rounds", help="Of what is compared; the rest is played once.")] = 3,
    levels: Annotated[str, typer.Option("--levels", help="Clients at once.")] = "1,2,4,8,32",
    requests: Annotated[int, typer.Option("--requests", help="Of each client in the closed loop.")] = 2,
    limit_s: Annotated[float, typer.Option("--limit-s", help="Longest time of a level.")] = 60.0,
    long_limit_s: Annotated[float, typer.Option("--long-limit-s", help="The same with eight clients.")] = 300.0,
    open_s: Annotated[float, typer.Option("--open-s", help="How long requests arrive in the open loop.")] = 60.0,
    think_s: Annotated[
        float, typer.Option("--think-s", help="Mean time between two requests of a client there.")
    ] = 8.0,
    deadline_s: Annotated[
        float, typer.Option("--deadline-s", help="Within which an answer is worth something.")
    ] = 30.0,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Tokens of an answer, at most.")] = 64,
    cpus: Annotated[float, typer.Option("--cpus", help="The quota.")] = 0.5,
    ctx: Annotated[int, typer.Option("--ctx", "-c", help="Tokens of context in all.")] = 16384,
    streams: Annotated[int, typer.Option("--streams", help="Answers being written when others come.")] = 4,
    seed: Annotated[int, typer.Option("--seed", help="Of prompts and arrivals.")] = 1,
    out_dir: Annotated[Path, typer.Option("--out-dir", help="Where tables, raw data and plots go.")] = Path(
        "out/bench-admission"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Limits, threads, gates and kvpsi with half a CPU, and beside busy neighbours, as clients see it. Needs root."""
    from kvpsi.bench.admission.run import run

    numbers = levels_in(levels, "1,2,4,8,32")
    with progress_on_stderr() as report:
        path = models.pull(model, report)
    plan = Plan(
        model=path,
        scenarios=cast("tuple[Scenario, ...]", _names("--scenarios", scenarios)),
        variants=_names("--variants", variants),
        parts=cast("tuple[Part, ...]", _names("--parts", parts)),
        rounds=rounds,
        levels=numbers,
        requests=requests,
        limit_s=limit_s,
        long_limit_s=long_limit_s,
        open_s=open_s,
        think_s=think_s,
        deadline_s=deadline_s,
        n_predict=n_predict,
        cpus=cpus,
        n_ctx=ctx,
        streams=streams,
        seed=seed,
    )
    with status_on_stderr() as say:
        document = run(plan, usable_folder(out_dir), say)
    show(document, as_json=json, words=map(in_words, document["levels"]))


def _names(option: str, text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if len(set(names)) < len(names):
        raise UsageError(f"{option} {text} names something twice.")
    return names
