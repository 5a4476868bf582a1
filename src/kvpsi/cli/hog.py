"""``kvpsi hog``: a neighbour that needs memory."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from kvpsi.cli.output import INTERRUPTED, print_json
from kvpsi.errors import UsageError
from kvpsi.units import format_bytes

if TYPE_CHECKING:
    from kvpsi.hog import HogReport, HogSettings

_MIB = 1 << 20


def hog(
    size_mib: Annotated[int, typer.Option("--pressure-mib", help="Most memory that it takes, in MiB.")] = 256,
    step_mib: Annotated[int, typer.Option("--pressure-step-mib", help="Taken at once, in MiB.")] = 2,
    warmup_s: Annotated[float, typer.Option("--pressure-warmup-s", help="Seconds before it begins.")] = 0.0,
    rate_mib_s: Annotated[float, typer.Option("--rate-mib-s", help="How fast it grows, in MiB a second.")] = 100.0,
    hold_s: Annotated[float, typer.Option("--hold-s", help="Seconds that it goes on once it has its size.")] = 10.0,
    shape: Annotated[str, typer.Option("--shape", help="grow, pulse, ramp or sawtooth.")] = "grow",
    period_s: Annotated[float, typer.Option("--period-s", help="Period of pulse, ramp and sawtooth.")] = 4.0,
    kind: Annotated[str, typer.Option("--kind", help="anon: own memory; file: page cache; both.")] = "anon",
    trace: Annotated[Path | None, typer.Option("--trace", help="Follow a file of lines seconds,size.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Also take more than the machine has in all.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Take memory, touch all of it over and over, and tell whether that was stalled or killed (exit status 1)."""
    from kvpsi.hog import Hog, HogSettings
    from kvpsi.hog.shape import MemoryKind, ShapeName
    from kvpsi.hog.trace import read_trace

    points = read_trace(trace) if trace is not None else ()
    settings = HogSettings(
        size_bytes=max((n_bytes for _, n_bytes in points), default=size_mib * _MIB),
        step_bytes=step_mib * _MIB,
        warmup_s=warmup_s,
        rate_bytes_s=rate_mib_s * _MIB,
        hold_s=hold_s,
        shape="trace" if trace is not None else cast("ShapeName", shape),
        period_s=period_s,
        kind=cast("MemoryKind", kind),
        trace=points,
    )
    if not points and settings.step_bytes > settings.size_bytes:
        raise UsageError("It takes whole steps only: lower --pressure-step-mib, or raise --pressure-mib.")
    if not force:
        _refuse_what_is_not_there(settings)
    process = Hog(settings)
    interrupted = False
    try:
        report = process.wait(_tell if sys.stderr.isatty() else lambda _time_s, _size_bytes: None)
    except KeyboardInterrupt:
        interrupted = True
        process.end()
        report = process.wait()
    if json:
        print_json(dataclasses.asdict(report))
    else:
        print(_in_words(report))
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if report.killed_by is not None:
        raise typer.Exit(1)


def _refuse_what_is_not_there(settings: HogSettings) -> None:
    """Whoever forgets the board should not have to restart the machine."""
    from kvpsi.pressure import open_source

    available_bytes = open_source().read().headroom.limit_bytes
    if settings.size_bytes > available_bytes:
        raise UsageError(
            f"{format_bytes(settings.size_bytes)} is more than the {format_bytes(available_bytes)} that there are: "
            "take less, or --force it."
        )


def _tell(time_s: float, size_bytes: int) -> None:
    print(f"{time_s:7.1f} s  {format_bytes(size_bytes)}", file=sys.stderr)


def _in_words(report: HogReport) -> str:
    had = f"had up to {format_bytes(report.peak_bytes)} in {report.seconds:.1f} s"
    if report.killed_by is not None:
        return f"hog: {had}, then it was killed ({report.killed_by})"
    stall = "unknown" if report.stall_s is None else f"{report.stall_s:.2f} s"
    slowest = 1000 * (report.slowest_touch_s or 0.0)
    ended = "completed" if report.completed else "ended early"
    return f"hog: {had}, {ended}; its cgroup stalled {stall}, the slowest touch of a step took {slowest:.1f} ms"
