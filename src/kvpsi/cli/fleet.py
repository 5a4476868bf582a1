"""``kvpsi simulate --fleet``: many boards behind a router."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvpsi.cli.bench.show import status_on_stderr
from kvpsi.cli.output import print_json

if TYPE_CHECKING:
    from kvpsi.sim.fleet.situation import Fleet

SEEDS = 3
ROUTERS = "random,round-robin,least-loaded,pressure"
"""All of `kvpsi.sim.fleet.routers.ROUTERS`, which is slow to load; a test compares."""


def simulate_fleet(
    fleet: Fleet, controllers: Sequence[str], routers: Sequence[str], seeds: Sequence[int], jobs: int, *, as_json: bool
) -> None:
    """Play all of them, and print a table or one JSON document.

    Raises:
        UsageError: a controller or a router is not known.
    """
    from kvpsi.sim.fleet.many import figures, play_all, row, runs

    with status_on_stderr() as say:
        found = play_all(fleet, controllers, routers, seeds, jobs or None, say)
    rows = [row(outcomes) for outcomes in found.values()]
    if as_json:
        print_json(
            {
                "fleet": dataclasses.asdict(fleet),
                "requests_s": fleet.load * fleet.capacity,
                "table": rows,
                "runs": runs(found),
                "figures": [figure.as_json() for figure in figures(found)],
                "problems": [],
            }
        )
        return
    print(
        f"{fleet.n_boards} boards that can answer {fleet.capacity:.3g} requests a second while nobody else needs "
        f"memory; {fleet.load * fleet.capacity:.3g} come, for {fleet.seconds:g} s."
    )
    _print(rows)


def _print(rows: Sequence[dict[str, object]]) -> None:
    """A column for each router, of each controller if there are several."""
    from rich.console import Console
    from rich.table import Table

    several = len({row["controller"] for row in rows}) > 1
    names = [f"{row['controller']}, {row['router']}" if several else str(row["router"]) for row in rows]
    table = Table("mean of the runs", *names)
    for key in [key for key in rows[0] if key not in ("controller", "router")]:
        table.add_row(key.replace("_", " "), *[f"{row[key]:g}" for row in rows])
    Console().print(table)
