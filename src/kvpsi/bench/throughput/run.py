"""Loads all servers in turn, in both orders, and compares."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvpsi.bench.client import Load, load
from kvpsi.bench.figures import Figure, quantile
from kvpsi.bench.prompts import draw
from kvpsi.bench.servers import Name, Running, Setting, left_out, missing_of, running
from kvpsi.bench.table import Table
from kvpsi.engines.loading import usable_threads
from kvpsi.errors import UsageError

Report = Callable[[str], None]
_LEVEL_OF_BATCHING = 8
_TARGETS = {"xllamacpp": 1.0, "llama-cpp-python": None, "kvpsi-streams": None}
_TARGETS_BATCHING = {"xllamacpp": 1.15, "llama-cpp-python": 3.0, "kvpsi-streams": None}


@dataclass(frozen=True, slots=True)
class Plan:
    """One comparison.

    Attributes:
        model: the GGUF file.
        servers: whom to compare; those that are not installed are left out.
        levels: clients at once.
        rounds: how often each level is played for each server; every second time in the opposite order.
        requests: of each client in a round.
        n_predict: tokens of an answer, at most.
        n_ctx: tokens of context in all.
        n_threads: of each server; 0: as many as can run.
        seed: of the prompts.
    """

    model: Path
    servers: tuple[Name, ...] = ("kvpsi", "xllamacpp", "llama-cpp-python")
    levels: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 3
    requests: int = 4
    n_predict: int = 64
    n_ctx: int = 16384
    n_threads: int = 0
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.servers or not self.levels or min(*self.levels, self.rounds, self.requests, self.n_predict) < 1:
            raise UsageError("There is one server at least; levels, rounds, requests and tokens are at least 1.")


@dataclass(frozen=True, slots=True)
class Played:
    """One server at one level in one round."""

    server: Name
    round: int
    load: Load
    rss_bytes: int


def run(plan: Plan, out_dir: Path, report: Report) -> dict[str, Any]:
    """The whole bench as one JSON-ready document; Ctrl-C ends it with what there is by then."""
    table = Table(out_dir / "throughput.csv")
    played: list[Played] = []
    interrupted = False
    missing = missing_of(plan.servers)
    setting = Setting(plan.model, plan.n_ctx, max(plan.levels), plan.n_threads or usable_threads())
    try:
        with contextlib.ExitStack() as stack:
            servers = []
            for name in plan.servers:
                if name not in missing:
                    report(f"starting {name}")
                    servers.append(stack.enter_context(running(name, setting)))
            for number in range(plan.rounds):
                for n_clients in plan.levels:
                    for server in servers if number % 2 == 0 else servers[::-1]:
                        report(f"round {number + 1} of {plan.rounds}: {n_clients} clients, {server.name}")
                        played.append(_play(plan, server, number, n_clients))
                        table.add(_row(played[-1]))
    except KeyboardInterrupt:
        interrupted = True
    return {
        "plan": {**asdict(plan), "model": plan.model.name},
        "interrupted": interrupted,
        "levels": _levels(played),
        "figures": [f.as_json() for f in figures_of(played)],
        "problems": [*table.problems, *map(left_out, missing)],
        "raw": table.paths,
    }


def _play(plan: Plan, server: Running, number: int, n_clients: int) -> Played:
    prompts = draw(n_clients * plan.requests, hash((plan.seed, number, n_clients)))  # nobody hears anything twice
    return Played(server.name, number + 1, load(server.url, prompts, n_clients, plan.n_predict), server.rss_bytes)


def _row(p: Played) -> dict[str, object]:
    latencies, firsts = [a.latency_s for a in p.load.asked], [a.first_token_s for a in p.load.asked]
    return {
        "server": p.server,
        "round": p.round,
        "clients": p.load.n_clients,
        "requests": len(p.load.asked),
        "tokens": sum(a.n_tokens for a in p.load.asked),
        "tok_s": round(p.load.tokens_per_second, 2),
        "latency_p50_s": round(quantile(latencies, 0.5), 4),
        "latency_p95_s": round(quantile(latencies, 0.95), 4),
        "first_token_p50_s": round(quantile(firsts, 0.5), 4),
        "first_token_p95_s": round(quantile(firsts, 0.95), 4),
        "rss_mib": round(p.rss_bytes / (1 << 20), 1),
    }


def _levels(played: Sequence[Played]) -> list[dict[str, object]]:
    """Each server at each level, all rounds together."""
    found: list[dict[str, object]] = []
    for n_clients in dict.fromkeys(p.load.n_clients for p in played):
        for server in dict.fromkeys(p.server for p in played):
            mine = [p for p in played if (p.server, p.load.n_clients) == (server, n_clients)]
            asked = [a for p in mine for a in p.load.asked]
            latencies, firsts = [a.latency_s for a in asked], [a.first_token_s for a in asked]
            found.append(
                {
                    "clients": n_clients,
                    "server": server,
                    "tok_s": statistics.median(p.load.tokens_per_second for p in mine) if mine else 0.0,
                    "latency_p50_s": quantile(latencies, 0.5),
                    "latency_p95_s": quantile(latencies, 0.95),
                    "first_token_p50_s": quantile(firsts, 0.5),
                    "first_token_p95_s": quantile(firsts, 0.95),
                }
            )
    return found


def figures_of(played: Sequence[Played]) -> list[Figure]:
    """Tokens a second of kvpsi to those of each other server, at each level: the median of the rounds' ratios."""
    speeds = {(p.server, p.load.n_clients, p.round): p.load.tokens_per_second for p in played}
    found = []
    for n_clients in dict.fromkeys(p.load.n_clients for p in played):
        targets = _TARGETS_BATCHING if n_clients == _LEVEL_OF_BATCHING else _TARGETS
        for other, target in targets.items():
            ratios = [
                mine / speeds[other, n, round_number]  # type: ignore[index]
                for (server, n, round_number), mine in speeds.items()
                if server == "kvpsi" and n == n_clients and (other, n, round_number) in speeds
            ]
            if ratios:
                name = f"clients_{n_clients}.tok_s_to_{other}"
                found.append(Figure(name, statistics.median(ratios), "", target, ">="))
    return found
