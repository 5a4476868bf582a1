"""``kvpsi bench quality``: what forgetting costs, for every policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpsi import models
from kvpsi.cli.bench.show import in_words, show, status_on_stderr, usable_folder
from kvpsi.cli.pull import progress_on_stderr
from kvpsi.errors import UsageError
from kvpsi.units import parse_share


def quality(
    model: Annotated[str, typer.Option("--model", "-m", help="As for `kvpsi pull`.")] = "default",
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="A text, may be repeated; default: Debian's documentation.")
    ] = None,
    policies: Annotated[str, typer.Option("--policies", help="Whom to compare; default: all.")] = "",
    kept: Annotated[str, typer.Option("--kept", help="Shares of the tokens that stay.")] = "75%,50%,25%,12.5%",
    tokens: Annotated[int, typer.Option("--tokens", help="Of each document.")] = 4096,
    documents: Annotated[int, typer.Option("--documents", help="For the perplexity of what follows.")] = 24,
    haystacks: Annotated[int, typer.Option("--haystacks", help="Documents with facts in them.")] = 3,
    facts: Annotated[int, typer.Option("--facts", help="In each of these.")] = 16,
    keep: Annotated[int, typer.Option("--keep", help="First tokens that are never forgotten.")] = 16,
    tail: Annotated[int, typer.Option("--tail", help="Last tokens that are never forgotten.")] = 256,
    threads: Annotated[int, typer.Option("--threads", "-t", help="Threads, 0: as many as can run.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the facts.")] = 1,
    out_dir: Annotated[Path, typer.Option("--out-dir", help="Where the raw data goes.")] = Path("out/bench-quality"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Perplexity after a trim, and facts that are still known, for every policy."""
    from kvpsi.bench.quality.run import Plan, run
    from kvpsi.kv import CacheSettings
    from kvpsi.kv.policies import POLICIES

    shares = tuple(parse_share(each) for each in kept.split(","))
    names = tuple(each.strip() for each in policies.split(",")) if policies else tuple(POLICIES)
    if tokens <= keep + tail:
        raise UsageError(f"--keep {keep} and --tail {tail} protect all of {tokens} tokens; raise --tokens.")
    with progress_on_stderr() as report:
        path = models.pull(model, report)
    plan = Plan(
        model=path,
        text=tuple(text or ()),
        policies=names,
        kept=shares,
        n_tokens=tokens,
        n_documents=documents,
        n_haystacks=haystacks,
        n_facts=facts,
        settings=CacheSettings(keep, tail),
        n_threads=threads,
        seed=seed,
    )
    with status_on_stderr() as say:
        document = run(plan, usable_folder(out_dir), say)
    show(document, as_json=json, words=map(in_words, document["policies"]))
