"""The same fleets for several routers, as figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from kvpsi.bench.figures import Figure
from kvpsi.sim.fleet.play import CONTROLLERS, Outcome, play
from kvpsi.sim.fleet.routers import ROUTERS
from kvpsi.sim.fleet.situation import Fleet
from kvpsi.sim.many import names_in
from kvpsi.sim.processes import spread

Found = Mapping[tuple[str, str], Sequence[Outcome]]
"""Outcomes, one for each seed, by controller and router."""

_COUNTS = ("requests", "models_killed", "neighbours_killed", "tokens_forgotten", "tokens_reread", "events")


def play_all(
    fleet: Fleet,
    controllers: Sequence[str],
    routers: Sequence[str],
    seeds: Sequence[int],
    n_jobs: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Found:
    """All seeds with all controllers and routers, on so many processors at once (None: all).

    Raises:
        UsageError: a controller or a router is not known.
    """
    controllers = names_in(controllers, CONTROLLERS, "Controllers of a fleet")
    routers = names_in(routers, tuple(ROUTERS), "Routers")
    jobs = [(controller, router, seed) for seed in seeds for controller in controllers for router in routers]
    found: dict[tuple[str, str], list[Outcome]] = {job[:2]: [] for job in jobs}
    for number, outcome in enumerate(spread(play, [(fleet, *job) for job in jobs], n_jobs), start=1):
        found[outcome.controller, outcome.router].append(outcome)
        say(f"simulating, {number} of {len(jobs)}")
    return found


def row(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """One controller and router in a table: sums of what is counted, else means over the seeds."""
    rows = [_row(outcome) for outcome in outcomes]
    summed: dict[str, object] = {"controller": outcomes[0].controller, "router": outcomes[0].router}
    summed["runs"] = len(outcomes)
    for key in rows[0]:
        values = [each[key] for each in rows]
        summed[key] = round(sum(values) if key in _COUNTS else statistics.fmean(values), 4)
    return summed


def _row(outcome: Outcome) -> dict[str, float]:
    n_requests = max(1, outcome.requests)
    return {
        "requests": outcome.requests,
        "refused_share": outcome.refused / n_requests,
        "failed_share": outcome.failed / n_requests,
        "retried_share": outcome.retried / n_requests,
        "latency_p50_s": outcome.latency_s(0.50),
        "latency_p95_s": outcome.latency_s(0.95),
        "latency_p99_s": outcome.latency_s(0.99),
        "first_token_p95_s": outcome.first_token_s(0.95),
        "models_killed": outcome.models_killed,
        "neighbours_killed": outcome.neighbours_killed,
        "tokens_forgotten": outcome.forgotten_tokens,
        "tokens_reread": outcome.paused_tokens,
        "sent_short_share": outcome.sent_short / max(1, outcome.sent),
        "stall_share": outcome.stall_share,
        "events": outcome.events,
    }


def runs(found: Found) -> list[dict[str, object]]:
    """Each seed by itself."""
    return [{**row([each]), "seed": each.seed} for outcomes in found.values() for each in outcomes]


def figures(found: Found) -> list[Figure]:
    """The same as figures, for the programs that read those of the benches."""
    return [
        Figure(f"{controller}.{router}.{key}", float(value), "s" if key.endswith("_s") else "")
        for (controller, router), outcomes in found.items()
        for key, value in row(outcomes).items()
        if isinstance(value, (int, float))
    ]
