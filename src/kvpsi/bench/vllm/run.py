"""Compares a stock and a governed vLLM: by turns while calm, then each on boards with a neighbour."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kvpsi.bench.client import load
from kvpsi.bench.figures import Figure
from kvpsi.bench.oom.scenarios import draw
from kvpsi.bench.processes import see_that_boards_can_be_made
from kvpsi.bench.prompts import draw as draw_prompts
from kvpsi.bench.table import Table
from kvpsi.bench.vllm.board import VARIANTS, Outcome, Room, measure_room, patient, play
from kvpsi.bench.vllm.calm import N_PREDICT, Played, play_round
from kvpsi.bench.vllm.server import GOVERNED, Server, Setting, serving
from kvpsi.board import BoardSettings
from kvpsi.errors import EnvironmentProblem, UsageError
from kvpsi.units import format_bytes

Report = Callable[[str], None]
_REQUESTS = 2
_ROUNDS_EACH = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """One comparison.

    Attributes:
        setting: of the servers.
        rounds: how often both are asked by turns while calm; 0 leaves that out.
        runs: scenarios on a board; 0 leaves them out.
        seed: of prompts and scenarios.
        memory_bytes: of a board.
        n_clients: who ask at once.
    """

    setting: Setting
    rounds: int = 12
    runs: int = 20
    seed: int = 1
    memory_bytes: int = 3200 << 20
    n_clients: int = 8

    def __post_init__(self) -> None:
        if min(self.rounds, self.runs) < 0 or self.n_clients < 1:
            raise UsageError("Give --rounds and --runs of 0 or more, and --clients of 1 or more.")
        if self.rounds + self.runs == 0:
            raise UsageError("Nothing would be measured; give --rounds or --runs above 0.")


def run(plan: Plan, out_dir: Path, report: Report) -> dict[str, Any]:
    """The whole bench as one JSON-ready document; Ctrl-C ends it with what there is by then.

    Raises:
        EnvironmentProblem: no board can be made here, or vLLM does not come up or fails a client while calm.
    """
    calm_table, board_table = Table(out_dir / "calm.csv"), Table(out_dir / "board.csv")
    played: list[Played] = []
    outcomes: list[Outcome] = []
    saved_share: list[float] = []
    problems: list[str] = []
    room: Room | None = None
    interrupted = False
    try:
        if plan.runs:
            see_that_boards_can_be_made(BoardSettings(plan.memory_bytes))
        if plan.rounds:
            _calm(plan, out_dir, report, calm_table, played, saved_share)
        if plan.runs:
            report("measuring what vLLM takes without its blocks")
            room = measure_room(plan.setting, plan.memory_bytes, plan.n_clients, _log_of(out_dir, "kvpsi"))
            if room.shares[0] >= room.shares[1]:
                raise EnvironmentProblem(
                    f"On a board of {format_bytes(plan.memory_bytes)} no neighbour fits beside a governed vLLM that "
                    "does not fit beside stock vLLM: change --memory, or raise --kv-gib."
                )
            scenarios = draw(plan.runs, plan.seed, {1: room.beside_least_bytes}, swaps=("none",), shares=room.shares)
            for scenario in (replace(each, hog=patient(each.hog)) for each in scenarios):
                for variant in VARIANTS if scenario.number % 2 else VARIANTS[::-1]:
                    report(f"playing, {scenario.number + 1} of {plan.runs}: {variant}, {_told(outcomes)}")
                    log = _log_of(out_dir, variant)
                    outcomes.append(play(scenario, variant, plan.setting, room, plan.n_clients, log))
                    board_table.add(row_of(outcomes[-1]))
    except KeyboardInterrupt:
        interrupted = True  # by then all servers and boards are gone
    except EnvironmentProblem as problem:
        if not outcomes and not played:
            raise
        problems.append(f"{problem} What was measured until then follows.")
    return {
        "plan": {**asdict(plan), "setting": {**asdict(plan.setting), "model": plan.setting.model.name}},
        "interrupted": interrupted,
        "room": asdict(room) if room else None,
        "calm": [asdict(each) for each in played],
        "board": [row_of(each) for each in outcomes],
        "figures": [
            f.as_json() for f in (*_idle_figures(saved_share), *calm_figures(played), *board_figures(outcomes))
        ],
        "problems": [*problems, *calm_table.problems, *board_table.problems],
        "raw": [*calm_table.paths, *board_table.paths],
    }


def _calm(
    plan: Plan, out_dir: Path, report: Report, table: Table, played: list[Played], saved_share: list[float]
) -> None:
    """With fresh servers now and then, as one process may be a little faster than another one of the same kind."""
    for first in range(0, plan.rounds, _ROUNDS_EACH):
        with contextlib.ExitStack() as stack:
            servers: dict[str, Server] = {}
            for variant in VARIANTS if first // _ROUNDS_EACH % 2 else VARIANTS[::-1]:
                report(f"starting vLLM, {variant}")
                own = GOVERNED if variant == "kvpsi" else {}
                servers[variant] = stack.enter_context(serving(plan.setting, _log_of(out_dir, variant), own))
            less_bytes = servers["stock"].rss_bytes() - servers["kvpsi"].rss_bytes()
            saved_share.append(less_bytes / servers["kvpsi"].status()["capacity_bytes"])
            for name, server in servers.items():
                report(f"warming up, {name}")
                load(server.url, draw_prompts(plan.n_clients, -plan.seed), plan.n_clients, N_PREDICT)
            for number in range(first, min(first + _ROUNDS_EACH, plan.rounds)):
                report(f"asking by turns, {number + 1} of {plan.rounds}")
                for each in play_round(servers, number, plan.n_clients, _REQUESTS, plan.seed):
                    played.append(each)
                    table.add(asdict(each))


def _log_of(out_dir: Path, variant: str) -> Path:
    """Where the last server of that kind said what it had to say."""
    return out_dir / f"vllm-{variant}.log"


def _told(outcomes: Sequence[Outcome]) -> str:
    return ", ".join(f"{v} killed {sum(o.variant == v and bool(o.kills) for o in outcomes)}" for v in VARIANTS)


def _idle_figures(saved_share: Sequence[float]) -> list[Figure]:
    return [Figure("idle.memory_below_stock_to_cache", min(saved_share), "", 0.8, ">=")] if saved_share else []


def calm_figures(played: Sequence[Played]) -> list[Figure]:
    """Tokens a second of kvpsi to stock's: the median of whole rounds' ratios."""
    ratios = []
    for number in dict.fromkeys(p.round for p in played):
        speeds = {}
        for name in VARIANTS:
            mine = [p for p in played if (p.round, p.server) == (number, name)]
            if len(mine) == 2:
                speeds[name] = sum(p.tokens for p in mine) / sum(p.seconds for p in mine)
        if len(speeds) == len(VARIANTS):
            ratios.append(speeds["kvpsi"] / speeds["stock"])
    return [Figure("calm.tok_s_to_stock", statistics.median(ratios), "", 0.98, ">=")] if ratios else []


def board_figures(outcomes: Sequence[Outcome]) -> list[Figure]:
    """Who was killed, and whether all got their answers."""
    governed, stock = ([o for o in outcomes if o.variant == variant] for variant in VARIANTS)
    found = []
    if governed:
        found.append(Figure("kvpsi.runs_with_kills", float(sum(bool(o.kills) for o in governed)), "", 0.0, "=="))
        found.append(Figure("kvpsi.runs_not_survived", float(sum(not o.survived for o in governed)), "", 0.0, "=="))
        found.append(Figure("kvpsi.failed_requests", float(sum(o.failed for o in governed)), "", 0.0, "=="))
    if stock:
        found.append(
            Figure("stock.share_of_runs_with_kills", sum(bool(o.kills) for o in stock) / len(stock), "", 1.0, ">=")
        )
        found.append(Figure("stock.share_of_runs_with_vllm_killed", sum(not o.answers for o in stock) / len(stock), ""))
    return found


def row_of(outcome: Outcome) -> dict[str, object]:
    """One scenario and variant in a line."""
    scenario = outcome.scenario
    return {
        "number": scenario.number,
        "variant": outcome.variant,
        "full": scenario.full,
        "shape": scenario.hog.shape,
        "size_mib": scenario.hog.size_bytes >> 20,
        "rate_mib_s": round(scenario.hog.rate_bytes_s / (1 << 20), 1),
        "kills": outcome.kills,
        "vllm_answers": outcome.answers,
        "hog_completed": outcome.hog.completed,
        "hog_killed_by": outcome.hog.killed_by,
        "hog_peak_mib": outcome.hog.peak_bytes >> 20,
        "answered": outcome.answered,
        "failed": outcome.failed,
        "peak_mib": outcome.peak_bytes >> 20,
        "stall_s": round(outcome.stall_s, 3),
        "hog_stall_s": outcome.hog.stall_s,
        "before_mib": outcome.before_bytes >> 20,
        "returned_mib": outcome.returned_bytes >> 20,
    }
