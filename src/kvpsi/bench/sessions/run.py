"""Has each server play the same, one after the other, and compares."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvpsi.bench.figures import Figure
from kvpsi.bench.processes import see_that_boards_can_be_made
from kvpsi.bench.servers import Setting, left_out, missing_of
from kvpsi.bench.sessions.play import Plan, Played, Tell, play
from kvpsi.bench.table import Table
from kvpsi.board import BoardSettings
from kvpsi.engines.loading import usable_threads

MIB = 1 << 20


def run(plan: Plan, out_dir: Path, tell: Tell) -> dict[str, Any]:
    """The whole bench as one JSON-ready document; Ctrl-C ends it with what there is by then."""
    table = Table(out_dir / "resident.csv")
    played: list[Played] = []
    interrupted = False
    missing = missing_of(plan.servers)
    setting = Setting(plan.model, plan.n_ctx, 4, plan.n_threads or usable_threads(), plan.spill_max)
    try:
        see_that_boards_can_be_made(BoardSettings(plan.memory_bytes))
        for name in plan.servers:
            if name not in missing:

                def note(doing: str, number: int, rss_bytes: int, name: str = name) -> None:
                    row = {"server": name, "doing": doing, "number": number, "rss_mib": round(rss_bytes / MIB, 1)}
                    table.add(row)

                played.append(Played(name))
                play(plan, played[-1], setting, note, tell)
    except KeyboardInterrupt:
        interrupted = True
    return {
        "plan": {**asdict(plan), "model": plan.model.name},
        "interrupted": interrupted,
        "servers": [_row(p) for p in played],
        "figures": [f.as_json() for f in figures_of(played)],
        "problems": [*table.problems, *map(left_out, missing)],
        "raw": table.paths,
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _row(p: Played) -> dict[str, object]:
    """One server, for people."""
    return {
        "server": p.server,
        "first_turn_s": _median(p.first_s),
        "second_turn_s": _median(p.second_s),
        "returned_s": _median(p.returned_s),
        "rss_begun_mib": round(p.begun_bytes / MIB),
        "requests_answered": p.answered,
        "rss_full_mib": round(p.full_bytes / MIB),
        "rss_beside_mib": round(p.beside_bytes / MIB) if p.beside_bytes else None,
        "kills": p.kills,
        "neighbour_lived": bool(p.hog and p.hog.killed_by is None),
    }


def figures_of(played: Sequence[Played]) -> list[Figure]:
    """What kvpsi is to reach, and the same of the others for comparison."""
    found = []
    for p in played:
        mine = p.server == "kvpsi"
        for turn, later_s in (("second_turn", p.second_s), ("returned", p.returned_s)):
            if later_s:
                ratio = statistics.median(later / first for later, first in zip(later_s, p.first_s, strict=True))
                found.append(Figure(f"{p.server}.{turn}_to_first", ratio, "", 0.1 if mine else None, "<="))
        if p.full_bytes:
            growth_bytes = p.full_bytes - p.begun_bytes
            found.append(Figure(f"{p.server}.growth", growth_bytes / MIB, "MiB"))
            if p.capacity_bytes:
                found.append(Figure(f"{p.server}.growth_to_cache", growth_bytes / p.capacity_bytes, "", 1.05, "<="))
        if p.beside_bytes:
            share = p.beside_bytes / p.full_bytes
            found.append(Figure(f"{p.server}.rss_beside_neighbour", share, "", 0.9 if mine else None, "<="))
        if p.answers_again:
            same = statistics.mean(a == b for a, b in zip(p.first_answers, p.first_again, strict=True))
            found.append(Figure(f"{p.server}.answers_identical", same, "", 1.0 if mine else None, "=="))
            same = statistics.mean(a == b for a, b in zip(p.answers, p.answers_again, strict=True))
            found.append(Figure(f"{p.server}.third_answers_identical", same, ""))
            found.append(Figure(f"{p.server}.cached_again", p.cached_again, "tokens"))
        found.append(Figure(f"{p.server}.kills", float(p.kills), "", 0.0 if mine else None, "=="))
    return found
