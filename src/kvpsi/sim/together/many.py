"""Boards with several models of several seeds, as a table and as figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from kvpsi.bench.figures import Figure
from kvpsi.sim.boards import MIB
from kvpsi.sim.together.play import TenantOutcome, TogetherOutcome, play_together
from kvpsi.sim.together.situation import Drawn

TOLERANCE = 0.10
"""By so much of it a model may miss its share."""


def play_drawn(plan: Drawn, seed: int) -> TogetherOutcome:
    """One seed."""
    return play_together(plan.together(seed))


def row(name: str, outcomes: Sequence[TenantOutcome]) -> dict[str, object]:
    """One model in a table: means over the seeds, and the worst of shares and swings."""

    def mean(value: Callable[[TenantOutcome], float]) -> float:
        return statistics.fmean(value(each) for each in outcomes)

    return {
        "name": name,
        "weight": outcomes[0].weight,
        "priority": outcomes[0].priority,
        "held_mib": round(mean(lambda each: each.held_bytes) / MIB, 1),
        "asked_mib": round(mean(lambda each: each.asked_bytes) / MIB, 1),
        "worst_error": round(max(each.error for each in outcomes), 3),
        "most_swings": round(max(each.swings for each in outcomes), 2),
        "tokens_lost": round(mean(lambda each: each.forgotten_tokens), 1),
        "tokens_written": round(mean(lambda each: each.written_tokens), 1),
        "killed": sum(each.killed for each in outcomes),
    }


def figures(outcomes: Sequence[TogetherOutcome]) -> list[Figure]:
    """Over all seeds: the worst share, the most swings, alone and beyond those that neighbours made, and who was
    killed."""
    tenants = [tenant for outcome in outcomes for tenant in outcome.tenants]
    was_short = any(outcome.short_share for outcome in outcomes)
    own_swings = [each.swings - outcome.neighbours_swings for outcome in outcomes for each in outcome.tenants]
    return [
        Figure("worst_share_error", max(tenant.error for tenant in tenants), "", TOLERANCE if was_short else None),
        Figure("most_swings", max(tenant.swings for tenant in tenants), "in 10 s"),
        Figure("most_swings_beyond_neighbours", max(0.0, *own_swings), "in 10 s", 1.0),
        Figure("short_share", statistics.fmean(outcome.short_share for outcome in outcomes), ""),
        Figure("killed", float(sum(len(outcome.killed) for outcome in outcomes)), "", 0.0, "=="),
        Figure("stall_s", statistics.fmean(outcome.stall_s for outcome in outcomes), "s"),
        Figure("least_headroom_mib", min(o.least_headroom_bytes for o in outcomes) / MIB, "MiB"),
    ]
