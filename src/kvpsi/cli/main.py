"""The ``kvpsi`` command: registers the commands and turns every failure into one line and an exit status.

To add a command, write one file beside this one with one function and register it below.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from kvpsi import __version__
from kvpsi.cli import bench, board, doctor, generate, hog, kvcached, plan, pull, serve, simulate, top, tune
from kvpsi.cli.output import INTERRUPTED, one_line
from kvpsi.errors import KvpsiError

Handler = Callable[[int, Any], None]
_asked_to_end: list[int] = []
_ENDING = [signal.SIGTERM] + [getattr(signal, name) for name in ("SIGHUP",) if hasattr(signal, name)]

app = typer.Typer(
    name="kvpsi",
    help="Run a llama.cpp model whose KV cache gives memory back under pressure.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(generate.generate)
app.add_typer(bench.app, name="bench")
app.add_typer(board.app, name="board")
app.command()(doctor.doctor)
app.command()(hog.hog)
app.command()(kvcached.kvcached)
app.command()(plan.plan)
app.command()(pull.pull)
app.command()(serve.serve)
app.command()(simulate.simulate)
app.command()(top.top)
app.command()(tune.tune)

_PACKAGES = {"llama_cpp": "llama-cpp-python", "simpy": "simpy", "psutil": "psutil", "filelock": "filelock"}


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvpsi {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; without arguments show the help."""
    arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller; without this, errors would go to standard output
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 - for the rest of the process
    _asked_to_end.clear()
    handlers: dict[int, Handler] = dict.fromkeys(_ENDING, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = _interrupt
    before = {n: signal.signal(n, h) for n, h in handlers.items() if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        return _run(arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _run(arguments: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = app(arguments, prog_name="kvpsi", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return 1
    except Exception as error:
        if os.environ.get("KVPSI_DEBUG") == "1":
            traceback.print_exc()
        message, status = _explained(error)
        if message:
            print(f"kvpsi: {one_line(message)}", file=sys.stderr)
        if isinstance(error, OSError):
            _discard_output()
        return status


def _interrupt(number: int, _: object) -> None:
    _asked_to_end.append(number)
    raise KeyboardInterrupt


def _terminate(number: int, _: object) -> None:
    """Clean up as after Ctrl-C."""
    _asked_to_end.append(number)
    raise SystemExit(128 + number)


def _explained(error: Exception) -> tuple[str, int]:
    """One sentence and an exit status for whatever a command raised."""
    if isinstance(error, KvpsiError):
        return str(error), error.exit_status
    # Typer's own complaints about the command line: it exports no class for them, but all have these two.
    format_message, exit_code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if callable(format_message) and isinstance(exit_code, int):
        if not str(format_message()):
            return "", exit_code  # the help was shown instead
        command = getattr(getattr(error, "ctx", None), "command_path", "kvpsi")
        return f"{str(format_message()).rstrip('.')}: `{command} --help` shows how to call it.", exit_code
    if isinstance(error, OSError):
        what = f" {error.filename!r}" if error.filename else " its output"
        return f"Could not read or write{what}: {error.strerror or error}.", 1
    if _asked_to_end:  # pydantic, for one, turns what is raised in the middle of it into an error of its own
        return "", 128 + _asked_to_end[-1]
    if isinstance(error, ModuleNotFoundError) and error.name in _PACKAGES:
        return f"The package {_PACKAGES[error.name]} is missing here: `pip install kvpsi` installs it.", 1
    bug = f"Internal error ({type(error).__name__}: {error})"
    return f"{bug}: please report it with what KVPSI_DEBUG=1 shows.", 1


def _discard_output() -> None:
    """Point standard output at nothing, so that the interpreter's last flush does not fail again."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


if __name__ == "__main__":
    sys.exit(main())
