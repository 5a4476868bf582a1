"""Fixed settings of the law beside those that it learns while it runs, on workloads that neither was tuned for.

Each workload is played with the law's defaults, with the one choice that was best for all workloads on other seeds
(*tuned*), with the choice that was best for this workload on those (*own*), and with the defaults and what they become
(*online*), which is not told which workload it is. *Best* is the cheapest of the three that are fixed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvpsi.bench.figures import Figure
from kvpsi.governor.adapt import AdaptSettings
from kvpsi.sim.controllers import Law
from kvpsi.sim.processes import spread
from kvpsi.sim.situation import Situation
from kvpsi.sim.tuning import Choice, Cost, Search, cost_with, mean_cost, ratio

WORST_OF_BEST = 1.10


@dataclass(frozen=True, slots=True)
class Compared:
    """What a workload costs, and the choice that is best for it."""

    workload: str
    default: Cost
    tuned: Cost
    own: Cost
    online: Cost
    own_choice: Choice

    @property
    def best(self) -> Cost:
        """The cheapest of those that are fixed."""
        return min((self.default, self.tuned, self.own), key=lambda cost: cost.later_s)


def compare(
    workloads: Mapping[str, Situation],
    tuning_seeds: Sequence[int],
    test_seeds: Sequence[int],
    n_jobs: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Choice, list[Compared]]:
    """The choice that was tuned for all workloads together, and each of them."""
    search = Search(list(workloads.values()), tuning_seeds, n_jobs, lambda text: say(f"tuning for all, {text}"))
    tuned = search.run(most_rounds=1).choice
    found = []
    for name, situation in workloads.items():
        own = Search([situation], tuning_seeds, n_jobs, lambda text: say(f"tuning for one, {text}"))
        choice = own.run(most_rounds=1, start=tuned).choice
        say(f"comparing {name}")
        controllers = Law(), Law(tuned.law), Law(choice.law), Law(adapt=AdaptSettings())
        costs = [play_with(situation, controller, test_seeds, n_jobs) for controller in controllers]
        found.append(Compared(name, costs[0], costs[1], costs[2], costs[3], choice))
    return tuned, found


def play_with(situation: Situation, controller: Law, seeds: Sequence[int], n_jobs: int | None = None) -> Cost:
    """What a controller costs, mean of the seeds; see `kvpsi.sim.tuning.cost_with`."""
    return mean_cost(spread(cost_with, [(situation, controller, seed) for seed in seeds], n_jobs))


def figures(compared: Sequence[Compared]) -> list[Figure]:
    """How near online comes to the best once it has learned, with the time that it took to learn, and whether it is
    better than the defaults."""
    of_best = {each.workload: ratio(each.online.later_s, each.best.later_s) for each in compared}
    whole = [ratio(each.online.whole_s, each.best.whole_s) for each in compared]

    def of_default(cost: Callable[[Compared], Cost]) -> float:
        return statistics.fmean(ratio(cost(each).whole_s, each.default.whole_s) for each in compared)

    return [
        Figure("workloads", float(len(compared)), "", 6.0, ">="),
        *(Figure(f"{name}.online_of_best", value, "", WORST_OF_BEST) for name, value in of_best.items()),
        Figure("worst_online_of_best", max(of_best.values()), "", WORST_OF_BEST),
        Figure("worst_online_of_best_with_learning", max(whole), ""),
        Figure("mean_online_of_default", of_default(lambda each: each.online), "", 1.0),
        Figure("mean_tuned_of_default", of_default(lambda each: each.tuned), ""),
        Figure("mean_best_of_default", of_default(lambda each: each.best), ""),
    ]
