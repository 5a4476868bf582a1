"""``kvpsi top``: what a running server is doing, in a terminal."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections import deque
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

    history = History()
    history.add(status)
    if once:
        Console().print(_screen(status, history))
        return
    with Live(_screen(status, history), auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            status = _status(url, api_key)
            history.add(status)
            live.update(_screen(status, history), refresh=True)


def _status(url: str, api_key: str) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    address = f"{url.rstrip('/').removesuffix('/v1')}/v1/kvpsi/status"
    try:
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            found: dict[str, Any] = json.loads(response.read())
            return found
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise UsageError(f"{address} wants an API key; give it with --api-key.") from error
        raise EnvironmentProblem(f"{address} answered with status {error.code}; is it kvpsi's server?") from error
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(
            f"There is no answer from {address} ({error}); start `kvpsi serve`, or give its address with --url."
        ) from error


class History:
    """The last minute of what changes."""

    def __init__(self) -> None:
        self.series: dict[str, deque[float]] = {
            name: deque(maxlen=_HISTORY)
            for name in ("memory_pressure", "headroom_bytes", "resident_bytes", "tokens_per_second")
        }
        self.told: deque[str] = deque(maxlen=_TOLD)

    def add(self, status: dict[str, Any]) -> None:
        """Take note of a look."""
        for name, values in self.series.items():
            values.append(float(status[name]))
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
    capacity = max(1, s["capacity_bytes"])
    rows = [
        ("memory pressure", f"{s['memory_pressure']:.1%}", "memory_pressure", 1.0),
        ("headroom", format_bytes(s["headroom_bytes"]), "headroom_bytes", max(1, s["memory_limit_bytes"])),
        ("KV resident", f"{format_bytes(s['resident_bytes'])} of {format_bytes(capacity)}", "resident_bytes", capacity),
        ("tokens a second", f"{s['tokens_per_second']:.1f}", "tokens_per_second", None),
    ]
    for name, value, series, top_value in rows:
        values = history.series[series]
        table.add_row(name, value, sparkline(values, max([1.0, *values]) if top_value is None else top_value))
    requests = f"{s['running']} of {s['parallel']} answered, {s['waiting']} waiting, {s['finished']} finished"
    table.add_row("requests", requests, f"{s['failed']} failed, {s['cancelled']} cancelled, {s['rejected']} rejected")
    saved = f"{s['sessions']} saved, {format_bytes(s['sessions_bytes'])}"
    table.add_row("conversations", saved, f"{s['sessions_dropped']} dropped, {s['pauses']} answers paused")
    given = f"{format_bytes(s['returned_bytes'])} in {s['releases']} releases"
    table.add_row("given back", given, f"{s['trims']} trims, {s['forgotten_tokens']} tokens forgotten")
    for line in history.told:
        table.add_row("governor", *line.split("  ", 1))
    return Panel(table, title=f"kvpsi · {s['model']}", expand=False)
