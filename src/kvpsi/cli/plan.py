"""``kvpsi plan``: what fits on a machine."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpsi.cli.output import print_json
from kvpsi.errors import UsageError
from kvpsi.units import format_bytes, parse_budget, parse_bytes

if TYPE_CHECKING:
    from kvpsi.sim.llms import Llm
    from kvpsi.sim.planning import Fit, Machine


def plan(
    model: Annotated[str, typer.Argument(help="1b, 3b, 7b, 8b, 13b, or as for `kvpsi pull`; several, or all.")],
    memory: Annotated[str, typer.Option("--memory", help="Of the machine, or of the cgroup: 8G if not given.")] = "",
    board: Annotated[str, typer.Option("--board", help="A preset instead; several, or all.")] = "",
    neighbours: Annotated[str, typer.Option("--neighbours", help="What everybody else has at most: 2G; 25%.")] = "0",
    quiet: Annotated[str, typer.Option("--quiet", help="What everybody else has at least: 500M; 5%.")] = "0",
    system: Annotated[str, typer.Option("--system", help="What kernel and services have: 500M if not given.")] = "",
    p_kill: Annotated[
        float, typer.Option("--p-kill", help="Risk that is taken each time that a neighbour grows.")
    ] = 1e-6,
    session_tokens: Annotated[int, typer.Option("--session-tokens", help="Of each of several sessions.")] = 4096,
    want: Annotated[str, typer.Option("--want", help="Say for which neighbours this comes out: 2048:8192.")] = "",
    cpus: Annotated[int, typer.Option("--cpus", help="Processors of the machine.")] = 4,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Which context, how many sessions and which type of cache fit, static and elastic, and why."""
    from kvpsi.sim.llms import LLMS, llm_named
    from kvpsi.sim.planning import room_beside

    wanted = _wanted(want)
    machines = _machines(board, memory, system, neighbours, quiet, cpus)
    llms = [llm_named(name) for name in _names(model, tuple(LLMS))]
    plans = [_Plan(name, machine, llm, p_kill, session_tokens) for name, machine in machines.items() for llm in llms]
    if json:
        documents = [each.document() for each in plans]
        for each, document in zip(plans, documents, strict=True):
            if wanted:
                document["neighbours_for"] = {
                    kv_type: [room_beside(llm, each.machine, p_kill, tokens) for tokens in wanted]
                    for kv_type, llm in each.llms.items()
                }
        print_json(documents[0] if len(documents) == 1 else {"plans": documents})
    elif len(plans) == 1 and not wanted:
        plans[0].explain()
    else:
        _print_table(plans, wanted)


class _Plan:
    """One model on one machine, with each type of cache."""

    def __init__(self, board: str, machine: Machine, llm: Llm, p_kill: float, session_tokens: int) -> None:
        from kvpsi.sim.llms import KV_BYTES, with_kv_type
        from kvpsi.sim.planning import fits

        self.board, self.machine, self.llm, self.p_kill = board, machine, llm, p_kill
        self.session_tokens = session_tokens
        self.llms = {kv_type: with_kv_type(llm, kv_type) for kv_type in KV_BYTES}
        self.fits: dict[str, list[Fit]] = {
            kv_type: fits(each, kv_type, machine, p_kill, session_tokens) for kv_type, each in self.llms.items()
        }

    def document(self) -> dict[str, Any]:
        from kvpsi.sim.planning import DELAY_S, rate_exceeded_with

        return {
            "board": self.board or None,
            "model": dataclasses.asdict(self.llm),
            "machine": dataclasses.asdict(self.machine),
            "p_kill": self.p_kill,
            "rate_bytes_s": rate_exceeded_with(self.p_kill, self.machine.n_cpus),
            "delay_s": DELAY_S,
            "session_tokens": self.session_tokens,
            "bytes_per_token": {kv_type: each.bytes_per_token for kv_type, each in self.llms.items()},
            "fits": [dataclasses.asdict(fit) for found in self.fits.values() for fit in found],
        }

    def explain(self) -> None:
        from rich.console import Console
        from rich.table import Table

        from kvpsi.sim.planning import DELAY_S, rate_exceeded_with

        found, machine, llm = [fit for each in self.fits.values() for fit in each], self.machine, self.llm
        rate = rate_exceeded_with(self.p_kill, machine.n_cpus)
        print(
            f"{llm.name}: weights {format_bytes(llm.weights_bytes)}, runtime {format_bytes(llm.runtime_bytes)}, "
            + ", ".join(f"{each.bytes_per_token} B a token ({kv_type})" for kv_type, each in self.llms.items())
        )
        print(
            f"kept free: {format_bytes(found[0].reserve_bytes)}, for a neighbour that grows at {format_bytes(rate)} a "
            f"second (faster with a probability of {self.p_kill:g}) for the {1000 * DELAY_S:.0f} ms until memory has "
            "been given back, and never less than the governor keeps"
        )
        print(
            f"cache = {format_bytes(machine.memory_bytes)} - system {format_bytes(machine.system_bytes)} - weights - "
            f"runtime - reserve - neighbours (static: {format_bytes(machine.neighbours_bytes)} at most; elastic: "
            f"{format_bytes(machine.quiet_bytes)} at least)"
        )
        sessions = f"sessions of {self.session_tokens}"
        table = Table("cache", "type", "size", "context", sessions, "left beside neighbours")
        for fit in found:
            size = format_bytes(max(0, fit.cache_bytes))
            table.add_row(fit.kind, fit.kv_type, size, str(fit.context), str(fit.sessions), str(fit.beside_tokens))
        Console().print(table)
        if all(fit.context == 0 for fit in found):
            print("It does not fit: take a smaller model, or more memory.")


def _print_table(plans: list[_Plan], wanted: tuple[int, ...]) -> None:
    """A row for each machine, model and type of cache."""
    from rich.console import Console
    from rich.table import Table

    from kvpsi.sim.planning import room_beside

    limits = [f"{end} for {tokens}" for end, tokens in zip(("most", "least"), wanted, strict=False)]
    table = Table("board", "model", "type", "static", "elastic", "factor", *limits)
    for each in plans:
        for kv_type, (static, elastic) in each.fits.items():
            llm = each.llms[kv_type]
            rooms = [room_beside(llm, each.machine, each.p_kill, tokens) for tokens in wanted]
            table.add_row(
                each.board or format_bytes(each.machine.memory_bytes),
                llm.name,
                kv_type,
                *(_context(fit.context, llm) for fit in (static, elastic)),
                f"{elastic.context / static.context:.1f}" if static.context and elastic.context else "-",
                *(format_bytes(room) if room >= 0 else "-" for room in rooms),
            )
    Console().print(table)
    print("* as long as the model was trained for; - it does not fit.")
    if wanted:
        print("most, least: what others may have at most, and have at least, so that just these contexts fit.")


def _context(tokens: int, llm: Llm) -> str:
    return "-" if not tokens else f"{tokens}{'*' if tokens == llm.n_ctx_train else ''}"


def _machines(boards: str, memory: str, system: str, neighbours: str, quiet: str, n_cpus: int) -> dict[str, Machine]:
    """By name of the preset; the name is empty where sizes are given."""
    from kvpsi.sim.boards import BOARDS, board_named
    from kvpsi.sim.planning import Machine

    if not boards:
        sizes = {"": (parse_bytes(memory or "8G"), _size(system or "500M", 0))}
    elif memory or system:
        raise UsageError("--board says how much memory there is; leave out --memory and --system, or --board.")
    else:
        found = [board_named(name) for name in _names(boards, tuple(BOARDS))]
        sizes = {each.name: (each.memory_bytes, each.system_bytes) for each in found}
    return {
        name: Machine(total, kept, _size(neighbours, total), _size(quiet, total), n_cpus)
        for name, (total, kept) in sizes.items()
    }


def _names(text: str, every: tuple[str, ...]) -> list[str]:
    if text == "all":
        return list(every)
    names = [text] if os.path.lexists(text) else [name.strip() for name in text.split(",")]
    return [each for name in names if name for each in (every if name == "all" else (name,))] or [text]


def _wanted(text: str) -> tuple[int, ...]:
    """Tokens beside neighbours at their most, and at their least."""
    if not text:
        return ()
    static, _, elastic = text.partition(":")
    if not (static.isdecimal() and elastic.isdecimal() and 0 < int(static) <= int(elastic)):
        raise UsageError(f"--want {text} is not two numbers of tokens, the smaller one first, such as 2048:8192.")
    return int(static), int(elastic)


def _size(text: str, total_bytes: int) -> int:
    return 0 if text.strip() in ("0", "0%") else parse_budget(text, total_bytes)
