"""``kvpsi board …``: a small machine to try things on."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from typing import Annotated, cast

import typer

from kvpsi.cli.output import one_line, print_json
from kvpsi.errors import UsageError
from kvpsi.units import format_bytes, parse_bytes

app = typer.Typer(help="Run commands on a small machine: a cgroup with its own memory limit.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(help="The command and its arguments, after --.")],
    memory: Annotated[str, typer.Option("--memory", help="Memory of the board: 600M.")] = "600M",
    swap: Annotated[str, typer.Option("--swap", help="none; zram: compressed memory; shared: the machine's.")] = "none",
    cpus: Annotated[float | None, typer.Option("--cpus", help="Processors: 0.5. Default: all.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Run a command on a fresh board and remove the board afterwards; the exit status is the command's. Needs root."""
    from kvpsi.board import BoardSettings, open_board
    from kvpsi.board.board import SwapKind
    from kvpsi.board.limited import Limits, scope_for
    from kvpsi.board.waiting import wait_for

    if shutil.which(command[0]) is None:
        raise UsageError(f"There is no command {command[0]} here: give a name in PATH or a path to a program.")
    memory_bytes = parse_bytes(memory)
    settings = BoardSettings(memory_bytes, cast("SwapKind", swap), cpus)
    limits = Limits(cpus, memory_bytes)
    scope = scope_for(limits, command, swap=swap != "none") if swap != "zram" else None
    if scope is not None:
        print("kvpsi: the board is a scope of systemd's, of which no figures are known.", file=sys.stderr)
        code = wait_for(subprocess.Popen(scope, stdout=sys.stderr if json else None, text=True))
        if json:
            print_json({"exit_status": code, "kills": None, "peak_bytes": None, "stall_s": None})
        raise typer.Exit(code)
    with open_board(settings) as board:
        process = board.start(command, stdout=sys.stderr if json else None)
        code = wait_for(process)
        figures = board.figures()
    if json:
        print_json({"exit_status": code, **dataclasses.asdict(figures)})
    else:
        peak = "unknown" if figures.peak_bytes is None else format_bytes(figures.peak_bytes)
        stall = "unknown" if figures.stall_s is None else f"{figures.stall_s:.2f} s"
        told = f"board: peak {peak} of {format_bytes(memory_bytes)}, {figures.kills} killed, stall {stall}"
        print(one_line(told), file=sys.stderr)
    raise typer.Exit(code)
