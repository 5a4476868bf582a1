"""What came out: a row for each level that was played, and the figures with their targets."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvpsi.bench.admission.adaptation import Adaptation
from kvpsi.bench.admission.clients import Outcome
from kvpsi.bench.admission.overload import Overload
from kvpsi.bench.admission.pace import Pace
from kvpsi.bench.admission.plan import COMPARED, RATIO_LEVEL, Loop, Plan, Scenario
from kvpsi.bench.figures import Figure, quantile

_STOCK, _OURS = "limits", "kvpsi"
_ADAPTIVE = "limits-adaptive"
_LEAST_TOK_S = 0.1  # less than one token in the time that is looked at


@dataclass(frozen=True, slots=True)
class Cell:
    """One level of one variant, or several rounds of it: what all clients got."""

    scenario: Scenario
    variant: str
    loop: Loop
    clients: int
    round: int
    seconds: float
    outcomes: tuple[Outcome, ...]

    def latencies_s(self) -> list[float]:
        """Of all that were answered, or were still waited for at the end."""
        return [o.latency_s for o in self.outcomes if o.answered or o.cut]

    @property
    def answered_share(self) -> float:
        """Who is turned away for good has no latency, but counts here."""
        return sum(o.answered for o in self.outcomes) / max(1, len(self.outcomes))

    def goodput(self, deadline_s: float) -> float:
        """Requests a second that were answered within the deadline, waiting and coming again included."""
        return sum(o.answered and o.latency_s <= deadline_s for o in self.outcomes) / self.seconds

    def row(self, deadline_s: float) -> dict[str, object]:
        """The cell in a table."""
        latencies, firsts = self.latencies_s(), [o.first_token_s for o in self.outcomes if o.first_token_s]
        gaps = [gap for o in self.outcomes for gap in o.gaps_s]
        return {
            "scenario": self.scenario,
            "variant": self.variant,
            "loop": self.loop,
            "clients": self.clients,
            "round": self.round,
            "requests": len(self.outcomes),
            "answered": sum(o.answered for o in self.outcomes),
            "cut": sum(o.cut for o in self.outcomes),
            "rejected": sum(o.rejected for o in self.outcomes),
            "failed": sum(bool(o.problem) for o in self.outcomes),
            "again": sum(o.attempts - 1 for o in self.outcomes),
            **{f"latency_p{p}_s": round(quantile(latencies, p / 100), 3) for p in (50, 95, 99)},
            **{f"first_token_p{p}_s": round(quantile(firsts, p / 100), 3) for p in (50, 95, 99)},
            **{f"gap_p{p}_ms": round(1000 * quantile(gaps, p / 100), 1) for p in (50, 95, 99)},
            "goodput_s": round(self.goodput(deadline_s), 4),
            "tok_s": round(sum(o.n_tokens for o in self.outcomes) / self.seconds, 2),
        }


def latency_figures(plan: Plan, cells: Sequence[Cell]) -> list[Figure]:
    """Tail latency at eight clients, of all rounds together: stock and matched threads to kvpsi; above 1 kvpsi is
    faster."""
    found = []
    for scenario in plan.scenarios:
        for loop, (theirs, ours), what, target in (
            ("closed", COMPARED["closed"], "stock", 20.0),
            ("open", COMPARED["open"], "matched", 1.3),
        ):
            them, us = (pooled(cells, scenario, variant, loop) for variant in (theirs, ours))
            if not them or not us:
                continue
            name = f"{scenario}.{loop}_{RATIO_LEVEL}"
            ratio = _ratio(quantile(them.latencies_s(), 0.95), quantile(us.latencies_s(), 0.95))
            found.append(Figure(f"{name}.p95_{what}_to_kvpsi", ratio, "", target, ">="))
            if loop == "closed":
                found.append(Figure(f"{name}.answered", us.answered_share, "", 1.0, ">="))
            else:
                least = 1 / them.seconds  # one answer
                good = us.goodput(plan.deadline_s) / max(them.goodput(plan.deadline_s), least)
                found.append(Figure(f"{name}.goodput_to_{what}", good, "", 1.0, ">="))
                found.append(Figure(f"{name}.answered_to_{what}", _ratio(us.answered_share, them.answered_share), ""))
    return found


def pooled(cells: Iterable[Cell], scenario: Scenario, variant: str, loop: str) -> Cell | None:
    """All rounds of a variant at the level that is compared."""
    mine = [c for c in cells if (c.scenario, c.variant, c.loop, c.clients) == (scenario, variant, loop, RATIO_LEVEL)]
    if not mine:
        return None
    outcomes = tuple(outcome for c in mine for outcome in c.outcomes)
    return replace(mine[0], seconds=sum(c.seconds for c in mine), outcomes=outcomes)


def pace_figures(paces: Sequence[Pace]) -> list[Figure]:
    """Gaps of the running streams while others come, to those of the same tokens without them."""
    found = []
    for pace in paces:
        ours = pace.variant == _OURS
        name = f"{pace.scenario}.pace.{pace.variant}"
        if pace.long_first_token_s is None or not pace.calm_s or not pace.pressed_s:
            found.append(Figure(f"{name}.long_prompt_was_read", False, "", True if ours else None, "=="))
            continue
        calm, pressed = quantile(pace.calm_s, 0.95), quantile(pace.pressed_s, 0.95)
        found.append(Figure(f"{name}.gap_p95_to_calm", _ratio(pressed, calm), "", 1.5 if ours else None))
        for share in (0.5, 0.99):
            ratio = _ratio(quantile(pace.pressed_s, share), quantile(pace.calm_s, share))
            found.append(Figure(f"{name}.gap_p{share * 100:.0f}_to_calm", ratio, ""))
        found.append(Figure(f"{name}.long_prompt_first_token", pace.long_first_token_s, "s"))
    return found


def adaptation_figures(played: Sequence[Adaptation]) -> list[Figure]:
    """Throughput beside neighbours to that of fixed threads, and afterwards to that before."""
    ours = {a.round: a for a in played if a.variant == _ADAPTIVE}
    fixed = {a.round: a for a in played if a.variant == _STOCK}
    both = sorted(ours.keys() & fixed.keys())
    found = []
    if both:
        busy = statistics.median(ours[n].busy / max(fixed[n].busy, _LEAST_TOK_S) for n in both)
        calm = statistics.median(_ratio(ours[n].calm, fixed[n].calm) for n in both)
        found.append(Figure("threads.tok_s_beside_neighbours_to_fixed", busy, "", 5.0, ">="))
        found.append(Figure("threads.tok_s_calm_to_fixed", calm, "", 0.97, ">="))
    if ours:
        after = statistics.median(_ratio(a.after, a.calm) for a in ours.values())
        found.append(Figure("threads.tok_s_afterwards_to_calm", after, "", 0.97, ">="))
        changes = sum(a.calm_changes for a in ours.values())
        found.append(Figure("threads.changes_while_calm", changes, "changes"))
    if fixed:
        after = statistics.median(_ratio(a.after, a.calm) for a in fixed.values())
        found.append(Figure("threads.fixed_tok_s_afterwards_to_calm", after, ""))
    return found


def overload_figures(played: Mapping[Scenario, Overload], queue: int) -> list[Figure]:
    """Goodput at twice the load, the queue, and whether it was worth coming again."""
    found = []
    for scenario, o in played.items():
        name = f"{scenario}.overload"
        found.append(Figure(f"{name}.goodput_to_sustainable", _ratio(o.goodput, o.sustainable), "", 0.9, ">="))
        found.append(Figure(f"{name}.most_waiting", o.most_waiting, "requests", queue, "<="))
        found.append(Figure(f"{name}.rejected_without_retry_after", o.told_nothing, "requests", 0, "<="))
        if o.honoured or o.told_too_long:
            found.append(Figure(f"{name}.kept_promises", o.kept / (o.honoured + o.told_too_long), "", 0.8, ">="))
    return found


def decision_figures(cost_us: Mapping[int, float]) -> list[Figure]:
    """What a decision costs with the longest queue, and how that grows."""
    least, most = min(cost_us), max(cost_us)
    return [
        Figure(f"decision.waiting_{most}", cost_us[most], "us", 100.0),
        Figure(f"decision.waiting_{most}_to_{least}", _ratio(cost_us[most], cost_us[least]), "", 3.0),
    ]


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0 if a else 1.0
