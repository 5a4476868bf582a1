"""Options that say what is simulated, as `kvpsi simulate` and `kvpsi tune` have them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpsi.errors import UsageError
from kvpsi.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from kvpsi.hog import HogSettings
    from kvpsi.sim.boards import Board, Swap
    from kvpsi.sim.llms import Llm
    from kvpsi.sim.situation import Situation

DEFAULT_BOARD = "vps-4gb"
DEFAULT_NEIGHBOURS = "camera:500M,browser:400M"
_MOST_SEEDS = 100_000

BoardOption = Annotated[str, typer.Option("--board", help="A preset; vps-4gb, if there is no --memory either.")]
MemoryOption = Annotated[str, typer.Option("--memory", help="Of any other board, or a cgroup: 600M.")]
SystemOption = Annotated[str, typer.Option("--system", help="What kernel and services have of --memory: 500M.")]
SwapOption = Annotated[str, typer.Option("--swap", help="none, zram (half of the memory), or its size.")]
ModelOption = Annotated[str, typer.Option("--model", "-m", help="1b, 3b, 7b, 8b, 13b, or as for `kvpsi pull`.")]
KvTypeOption = Annotated[str, typer.Option("--kv-type", help="f16 or q8_0.")]
CtxOption = Annotated[int, typer.Option("--ctx", "-c", help="Tokens of the cache.")]
NeighboursOption = Annotated[
    str, typer.Option("--neighbours", help="Kinds with the most that each takes; none with a --trace.")
]
TraceOption = Annotated[Path | None, typer.Option("--trace", help="A neighbour: lines of seconds,size.")]
SecondsOption = Annotated[float, typer.Option("--seconds", help="That are simulated of each.")]
ConversationsOption = Annotated[int, typer.Option("--conversations", help="That go on at the same time.")]
FirstTokensOption = Annotated[int, typer.Option("--first-tokens", help="Of a conversation's first prompt, mean.")]
ThinkOption = Annotated[float, typer.Option("--think-s", help="Between two questions, mean.")]
SeedOption = Annotated[int, typer.Option("--seed", help="The first of the seeds.")]
JobsOption = Annotated[int, typer.Option("--jobs", "-j", help="Processes at once; 0: one for each processor.")]


def check_counts(seeds: int, jobs: int) -> None:
    """Refuse numbers of --seeds and --jobs that make no sense."""
    if not 1 <= seeds <= _MOST_SEEDS:
        raise UsageError(f"--seeds {seeds} makes no sense; give 1 to {_MOST_SEEDS}.")
    if jobs < 0:
        raise UsageError(f"--jobs {jobs} makes no sense; give 0 or more.")


def told(board: Board, llm: Llm) -> str:
    """A line about board and model."""
    swap = f"{format_bytes(board.swap.size_bytes)} of swap" if board.swap else "no swap"
    return (
        f"{board.name}: {format_bytes(board.memory_bytes)}, {format_bytes(board.system_bytes)} for the system, "
        f"{swap}; {llm.name}: weights of {format_bytes(llm.weights_bytes)}, {llm.bytes_per_token} B a token."
    )


def board_of(name: str, memory: str, system: str, swap: str) -> Board:
    """What --board or --memory and --system, and --swap ask for."""
    from kvpsi.sim.boards import Board, board_named

    if name and memory:
        raise UsageError("--board has its memory, and --memory is a board of its own; leave one of them out.")
    if system and not memory:
        raise UsageError("--system is for a board of --memory; the presets know what their systems have.")
    if memory:
        n_bytes, system_bytes = parse_bytes(memory), 0 if system in ("", "0") else parse_bytes(system)
        board = Board("board", n_bytes, system_bytes, scope="cgroup:board")
    else:
        board = board_named(name or DEFAULT_BOARD)
    if swap:
        board = dataclasses.replace(board, swap=_swap(swap, board.memory_bytes))
    return board


def _swap(text: str, memory_bytes: int) -> Swap | None:
    from kvpsi.sim.boards import Swap

    if text in ("none", "0"):
        return None
    return Swap(memory_bytes // 2 if text == "zram" else parse_bytes(text))


def given_in(context: typer.Context) -> set[str]:
    """Names of the options that were given on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def remarks_on(situation: Situation) -> list[str]:
    """What cannot work, as sentences."""
    board, llm = situation.board, situation.llm
    if board.system_bytes + llm.weights_bytes + llm.runtime_bytes > board.memory_bytes:
        return [
            f"{llm.name} does not fit on this board even alone: {format_bytes(llm.weights_bytes)} of weights and "
            f"{format_bytes(llm.runtime_bytes)} of runtime; take a smaller model, or more memory."
        ]
    return []


def neighbours_in(text: str) -> tuple[tuple[str, int], ...]:
    """What --neighbours asks for: kinds and sizes."""
    from kvpsi.sim.neighbours import ALL

    found = []
    for each in (part.strip() for part in text.split(",") if part.strip()):
        kind, _, size = each.partition(":")
        if kind not in ALL or not size:
            raise UsageError(f"--neighbours {each} is not one of {', '.join(ALL)} with a size, such as camera:400M.")
        found.append((kind, parse_bytes(size)))
    return tuple(found)


def trace_in(path: Path | None) -> HogSettings | None:
    """A neighbour that does what the file of --trace says."""
    from kvpsi.hog import HogSettings
    from kvpsi.hog.trace import read_trace
    from kvpsi.sim.boards import TOUCH_BYTES_S

    if path is None:
        return None
    points = read_trace(path)
    most = max(size for _, size in points)
    return HogSettings(max(1, most), shape="trace", trace=points, rate_bytes_s=TOUCH_BYTES_S)
