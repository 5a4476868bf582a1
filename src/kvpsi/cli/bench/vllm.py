"""``kvpsi bench vllm``: a governed vLLM beside stock vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvpsi import models
from kvpsi.cli.bench.show import in_words, show, status_on_stderr, usable_folder
from kvpsi.cli.pull import progress_on_stderr
from kvpsi.units import parse_bytes


def vllm(
    model: Annotated[
        str, typer.Option("--model", "-m", help="A Hugging Face folder, or as for `kvpsi pull`.")
    ] = "default",
    rounds: Annotated[int, typer.Option("--rounds", help="How often both are asked by turns; 0: not at all.")] = 12,
    runs: Annotated[int, typer.Option("--runs", help="Scenarios with a neighbour on a board; 0: none.")] = 20,
    seed: Annotated[int, typer.Option("--seed", help="Of prompts and scenarios.")] = 1,
    memory: Annotated[str, typer.Option("--memory", help="Memory of a board.")] = "3200M",
    kv_gib: Annotated[int, typer.Option("--kv-gib", min=1, help="GiB of KV cache of each vLLM.")] = 1,
    clients: Annotated[int, typer.Option("--clients", help="Who ask at once.")] = 8,
    vllm_options: Annotated[
        str, typer.Option("--vllm-options", help="More options of vLLM's own.")
    ] = "--enforce-eager",
    out_dir: Annotated[Path, typer.Option("--out-dir", help="Where the raw data goes.")] = Path("out/bench-vllm"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Tokens a second while calm, and who is killed beside a neighbour. Needs vLLM, and root for the boards."""
    import shlex

    from kvpsi.bench.vllm.model import folder_of
    from kvpsi.bench.vllm.run import Plan, run
    from kvpsi.bench.vllm.server import Setting

    memory_bytes = parse_bytes(memory)
    path = Path(model)
    if not path.is_dir():
        with progress_on_stderr() as report:
            path = folder_of(models.pull(model, report))
    setting = Setting(path, kv_gib, options=tuple(shlex.split(vllm_options)))
    plan = Plan(setting, rounds, runs, seed, memory_bytes, clients)
    with status_on_stderr() as say:
        document = run(plan, usable_folder(out_dir), say)
    show(document, as_json=json, words=map(in_words, document["board"]))
