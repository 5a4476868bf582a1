"""``kvpsi top``: what a running server is doing, in a terminal; one that is vLLM tells less than `kvpsi serve`."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpsi.cli.output import print_json
from kvpsi.errors import EnvironmentProblem, UsageError
from kvpsi.units import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

_BARS = " ▁▂▃▄▅▆▇█"
_HISTORY = 60
_TIMEOUT_S = 5.0
_TOLD = 6


def top(
    url: Annotated[str, typer.Option("--url", envvar="KVPSI_URL", help="Of the server.")] = "http://127.0.0.1:8080",
    api_key: Annotated[str, typer.Option("--api-key", envvar="KVPSI_API_KEY", help="If it wants one.")] = "",
    interval_s: Annotated[float, typer.Option("--interval-s", help="Between two looks.")] = 1.0,
    record: Annotated[
        Path | None, typer.Option("--record", help="Write what others take to a file, for `kvpsi simulate --trace`.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Look once, print it and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Look once, and print one JSON document.")] = False,
) -> None:
    """Pressure, headroom, memory, speed and decisions of a running server, until Ctrl-C."""
    if not 0.05 <= interval_s <= 3600:
        raise UsageError(f"An interval of {interval_s:g} s makes no sense; give 0.05 to 3600 with --interval-s.")
    status = _status(url, api_key)
    if json:
        print_json(status)
        return
    from rich.console import Console
    from rich.live import Live

    from kvpsi.hog.trace import TraceWriter

    history, console = History(), Console()
    live = Live(console=console, auto_refresh=False) if console.is_interactive and not once else None
    trace = TraceWriter(record) if record is not None else None
    with live or contextlib.nullcontext(), contextlib.closing(trace) if trace else contextlib.nullcontext():
        while True:
            history.add(status)
            if trace is not None:
                trace.add(time.monotonic(), _others_bytes(status))
            if live is not None:
                live.update(_screen(status, history), refresh=True)
            else:
                console.print(_screen(status, history))
            if once:
                return
            time.sleep(interval_s)
            status = _status(url, api_key)


def _others_bytes(status: dict[str, Any]) -> int:
    """What is neither free nor the conversations': it is how this changes that counts."""
    own = status["committed_bytes"] + status.get("sessions_bytes", 0)
    return int(status["memory_limit_bytes"] - status["headroom_bytes"] - own)


def _held_bytes(status: dict[str, Any]) -> int:
    """What conversations have in memory; only `kvpsi serve` saves some beside the cache."""
    return int(status["resident_bytes"] + status.get("sessions_bytes", 0))


def _status(url: str, api_key: str) -> dict[str, Any]:
    if "://" not in url:
        url = f"http://{url}"
    if not url.lower().startswith(("http://", "https://")):
        raise UsageError(f"{url} is no address of a server; give one that begins with http:// or https:// with --url.")
    keys = api_key.replace(",", " ").split()  # a server may have been given several by the same variable
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    address = f"{url.rstrip('/').removesuffix('/v1')}/v1/kvpsi/status"
    try:
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            found: dict[str, Any] = json.loads(response.read())
            return found
    except urllib.error.HTTPError as error:
        if error.code == 401 and api_key:
            raise UsageError(f"{address} does not accept this API key; give another one with --api-key.") from error
        if error.code == 401:
            raise UsageError(f"{address} wants an API key; give it with --api-key.") from error
        raise EnvironmentProblem(
            f"{address} answered with status {error.code}; is it kvpsi's server, or a governed vLLM's "
            "KVPSI_STATUS_PORT?"
        ) from error
    except (OSError, ValueError, HTTPException) as error:
        raise EnvironmentProblem(
            f"There is no answer from {address} ({error}); start `kvpsi serve`, or give its address, or that of a "
            "governed vLLM's KVPSI_STATUS_PORT, with --url."
        ) from error


class History:
    """The last minute of what changes."""

    def __init__(self) -> None:
        self.series: dict[str, deque[float]] = {
            name: deque(maxlen=_HISTORY)
            for name in ("memory_pressure", "headroom_bytes", "memory_bytes", "tokens_per_second")
        }
        self.told: deque[str] = deque(maxlen=_TOLD)

    def add(self, status: dict[str, Any]) -> None:
        """Take note of a look."""
        figures = {**status, "memory_bytes": _held_bytes(status)}
        for name, values in self.series.items():
            values.append(float(figures.get(name, 0.0)))
        if not self.told or self.told[-1].partition("  ")[2] != status["reason"]:
            self.told.append(f"{time.strftime('%H:%M:%S')}  {status['reason']}")


def sparkline(values: deque[float], top: float) -> str:
    """A row of bars, the highest for ``top`` and above."""
    steps = len(_BARS) - 1
    return "".join(_BARS[min(steps, max(0, round(steps * value / top)))] if top > 0 else _BARS[0] for value in values)


def _screen(s: dict[str, Any], history: History) -> RenderableType:
    from rich.panel import Panel
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for row in (*_bars(s, history), *_held(s), *_asked(s), *_given(s)):
        table.add_row(*row)
    for line in history.told:
        table.add_row("governor", *line.split("  ", 1))
    return Panel(table, title=f"kvpsi · {s['model']}", expand=False)


def _bars(s: dict[str, Any], history: History) -> Iterator[tuple[str, ...]]:
    capacity = max(1, s["capacity_bytes"])
    held = f"{format_bytes(_held_bytes(s))} of {format_bytes(capacity)}"
    rows = [
        ("memory pressure", f"{s['memory_pressure']:.1%}", "memory_pressure", 1.0),
        ("headroom", format_bytes(s["headroom_bytes"]), "headroom_bytes", max(1, s["memory_limit_bytes"])),
        ("conversations", held, "memory_bytes", capacity),
    ]
    if "tokens_per_second" in s:
        rows.insert(2, ("tokens a second", f"{s['tokens_per_second']:.1f}", "tokens_per_second", None))
    for name, value, series, top_value in rows:
        values = history.series[series]
        yield name, value, sparkline(values, max([1.0, *values]) if top_value is None else top_value)


def _held(s: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    yield "  in the cache", format_bytes(s["resident_bytes"])
    if s.get("all_may_hold_bytes"):
        due = f"{format_bytes(s['may_hold_bytes'])} of {format_bytes(s['all_may_hold_bytes'])}"
        yield "  share", due, f"weight {s['share_weight']:g} of {s['all_shares_weight']:g}"
    if "sessions" in s:
        kept = f"{s['sessions'] - s['sessions_parked']} ({format_bytes(s['sessions_bytes'])})"
        yield "  saved", kept, f"{s['sessions_dropped']} dropped, {s['pauses']} answers paused"
        if s["sessions_parked"]:
            yield "  parked", f"{s['sessions_parked']} ({format_bytes(s['parked_bytes'])} on disk)"
    else:
        yield "  may be used", format_bytes(s["limit_bytes"]), f"{s['pauses']} answers paused"


def _asked(s: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    requests, outcomes = f"answering {s['running']} of {s['parallel']}, {s['waiting']} waiting", ""
    if "finished" in s:
        requests += f", {s['finished']} finished"
        rejected = sum(s["rejected"].values())
        outcomes = f"{s['failed']} failed, {s['cancelled']} cancelled, {rejected} rejected"
    yield "requests", requests, outcomes
    yield "  at once", f"{s['concurrency_limit']} of {s['parallel']} at most", s.get("admission_reason", "")
    if "threads" in s:
        yield "threads", str(s["threads"]), s["threads_reason"]


def _given(s: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    lost = ""
    if "trims" in s:
        lost = f"{s['trims']} trims, {s['forgotten_tokens']} tokens forgotten, {s['healed_tokens']} healed"
    yield "given back", f"{format_bytes(s['returned_bytes'])} in {s['releases']} releases", lost
    yield "reserve", format_bytes(s["reserve_bytes"]), f"grows back above {format_bytes(s['regrow_bytes'])}"
    for line in s["learned"]:
        yield "learned", "", line
