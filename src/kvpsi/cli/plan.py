"""``kvpsi plan``: what fits on a machine."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from kvpsi.cli.output import print_json
from kvpsi.units import format_bytes, parse_bytes


def plan(
    model: Annotated[str, typer.Argument(help="1b, 3b, 7b, 8b, 13b, or as for `kvpsi pull`.")],
    memory: Annotated[str, typer.Option("--memory", help="Of the machine, or of the cgroup, such as 8G.")] = "8G",
    neighbours: Annotated[str, typer.Option("--neighbours", help="What everybody else has at most.")] = "0",
    quiet: Annotated[str, typer.Option("--quiet", help="What everybody else has at least.")] = "0",
    system: Annotated[str, typer.Option("--system", help="What kernel and services always have.")] = "500M",
    p_kill: Annotated[
        float, typer.Option("--p-kill", help="Risk that is taken each time that a neighbour grows.")
    ] = 1e-6,
    session_tokens: Annotated[int, typer.Option("--session-tokens", help="Of each of several sessions.")] = 4096,
    cpus: Annotated[int, typer.Option("--cpus", help="Processors of the machine.")] = 4,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Which context, how many sessions and which type of cache fit, static and elastic, and why."""
    from kvpsi.sim.llms import KV_BYTES, llm_named, with_kv_type
    from kvpsi.sim.planning import DELAY_S, Machine, fits, rate_exceeded_with

    machine = Machine(parse_bytes(memory), _size(system), _size(neighbours), _size(quiet), cpus)
    llm = llm_named(model)
    llms = {kv_type: with_kv_type(llm, kv_type) for kv_type in KV_BYTES}
    found = [fit for kv_type, llm in llms.items() for fit in fits(llm, kv_type, machine, p_kill, session_tokens)]
    rate = rate_exceeded_with(p_kill, cpus)
    if json:
        document: dict[str, Any] = {
            "model": dataclasses.asdict(llm),
            "machine": dataclasses.asdict(machine),
            "p_kill": p_kill,
            "rate_bytes_s": rate,
            "delay_s": DELAY_S,
            "session_tokens": session_tokens,
            "bytes_per_token": {kv_type: each.bytes_per_token for kv_type, each in llms.items()},
            "fits": [dataclasses.asdict(fit) for fit in found],
        }
        print_json(document)
        return
    reserve = found[0].reserve_bytes
    print(
        f"{llm.name}: weights {format_bytes(llm.weights_bytes)}, runtime {format_bytes(llm.runtime_bytes)}, "
        + ", ".join(f"{each.bytes_per_token} B a token ({kv_type})" for kv_type, each in llms.items())
    )
    print(
        f"kept free: {format_bytes(reserve)}, for a neighbour that grows at {format_bytes(rate)} a second (faster with "
        f"a probability of {p_kill:g}) for the {1000 * DELAY_S:.0f} ms until memory has been given back, and never "
        "less than the governor keeps"
    )
    print(
        f"cache = {format_bytes(machine.memory_bytes)} - system {format_bytes(machine.system_bytes)} - weights - "
        f"runtime - reserve - neighbours (static: {format_bytes(machine.neighbours_bytes)} at most; elastic: "
        f"{format_bytes(machine.quiet_bytes)} at least)"
    )
    _print(found, session_tokens)
    if all(fit.context == 0 for fit in found):
        print("It does not fit: take a smaller model, or more memory.")


def _print(found: list[Any], session_tokens: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("cache", "type", "size", "context", f"sessions of {session_tokens}", "left beside neighbours")
    for fit in found:
        size = format_bytes(max(0, fit.cache_bytes))
        table.add_row(fit.kind, fit.kv_type, size, str(fit.context), str(fit.sessions), str(fit.beside_tokens))
    Console().print(table)


def _size(text: str) -> int:
    return 0 if text.strip() == "0" else parse_bytes(text)
