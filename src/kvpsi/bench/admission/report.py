"""What came out: a row for each level that was played, and the figures with their targets."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvpsi.bench.admission.adaptation import Adaptation
from kvpsi.bench.admission.clients import Outcome
from kvpsi.bench.admission.overload import Overload
from kvpsi.bench.admission.pace import Pace
from kvpsi.bench.admission.plan import RATIO_LEVEL, Plan, Scenario
from kvpsi.bench.figures import Figure, quantile

_STOCK, _MATCHED, _OURS = "limits", "limits-matched", "kvpsi"
_ADAPTIVE = "limits-adaptive"
_LEAST_TOK_S = 0.1  # less than one token in the time that is looked at


@dataclass(frozen=True, slots=True)
class Cell:
    """One level of one variant: what all clients got."""

    scenario: Scenario
    variant: str
    loop: str
    clients: int
    seconds: float
    outcomes: tuple[Outcome, ...]

    def latencies_s(self) -> list[float]:
        """Of all that were answered, or were still waited for at the end."""
        return [o.latency_s for o in self.outcomes if o.answered or o.cut]

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


def latency_figures(plan: Plan, cells: Iterable[Cell]) -> list[Figure]:
    """Tail latency at eight clients: stock and matched threads to kvpsi; above 1 kvpsi is faster."""
    by = {(c.scenario, c.variant, c.loop, c.clients): c for c in cells}
    found = []
    for scenario in plan.scenarios:
        stock, ours = (by.get((scenario, name, "closed", RATIO_LEVEL)) for name in (_STOCK, _OURS))
        if stock and ours:
            ratio = _ratio(quantile(stock.latencies_s(), 0.95), quantile(ours.latencies_s(), 0.95))
            found.append(Figure(f"{scenario}.closed_8.p95_stock_to_kvpsi", ratio, "", 20.0, ">="))
        matched, ours = (by.get((scenario, name, "open", RATIO_LEVEL)) for name in (_MATCHED, _OURS))
        if matched and ours:
            ratio = _ratio(quantile(matched.latencies_s(), 0.95), quantile(ours.latencies_s(), 0.95))
            good = _ratio(ours.goodput(plan.deadline_s), matched.goodput(plan.deadline_s))
            found.append(Figure(f"{scenario}.open_8.p95_matched_to_kvpsi", ratio, "", 1.3, ">="))
            found.append(Figure(f"{scenario}.open_8.goodput_to_matched", good, "", 1.0, ">="))
    return found


def pace_figures(paces: Sequence[Pace]) -> list[Figure]:
    """Gaps of the running streams while others come, to those before."""
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
    return found


def overload_figures(played: Mapping[Scenario, Overload], queue: int) -> list[Figure]:
    """Goodput at twice the load, the queue, and whether it was worth coming again."""
    found = []
    for scenario, o in played.items():
        name = f"{scenario}.overload"
        found.append(Figure(f"{name}.goodput_to_sustainable", _ratio(o.goodput, o.sustainable), "", 0.9, ">="))
        found.append(Figure(f"{name}.most_waiting", o.most_waiting, "requests", queue, "<="))
        found.append(Figure(f"{name}.rejected_without_retry_after", o.told_nothing, "requests", 0, "<="))
        if o.honoured:
            found.append(Figure(f"{name}.kept_promises", o.kept / o.honoured, "", 0.8, ">="))
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
