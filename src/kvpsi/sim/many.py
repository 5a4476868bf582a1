"""The same situations for several controllers, many times over, on all processors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from kvpsi.bench.figures import Figure, quantile
from kvpsi.errors import UsageError
from kvpsi.sim.attackers import most_beyond, most_within
from kvpsi.sim.boards import MIB
from kvpsi.sim.controllers import CONTROLLERS, Law, controller_named
from kvpsi.sim.play import Outcome, play
from kvpsi.sim.processes import spread
from kvpsi.sim.situation import Situation

SAFE = "safe"
"""A static cache of the size that fits even when all neighbours have most, which is what careful people choose."""


def play_one(situation: Situation, name: str, seed: int) -> Outcome:
    """One seed with one controller.

    Raises:
        UsageError: there is no such controller.
    """
    setup = situation.setup(seed)
    if name == SAFE:
        n_ctx = situation.safe_ctx()
        if n_ctx < 1:
            raise UsageError("Even without a cache this model does not fit beside the neighbours at their most.")
        return replace(play(replace(setup, n_ctx=n_ctx), controller_named("static")), controller=SAFE)
    return play(setup, Law(situation.law, adapt=situation.adapt) if name == Law.name else controller_named(name))


def controllers_in(names: Sequence[str]) -> tuple[str, ...]:
    """The names, if all are known.

    Raises:
        UsageError: one is not.
    """
    return names_in(names, (SAFE, *CONTROLLERS), "Controllers")


def names_in(names: Sequence[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    """The names, each once, if all are known.

    Raises:
        UsageError: one is not, or there are none; ``what`` says what they are names of.
    """
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(f"{what} are {', '.join(known)}, not {', '.join(unknown) or 'none'}.")
    return tuple(dict.fromkeys(names))


def play_all(
    situation: Situation,
    names: Sequence[str],
    seeds: Sequence[int],
    n_jobs: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, list[Outcome]]:
    """All seeds with all controllers, on so many processors at once (None: all)."""
    found: dict[str, list[Outcome]] = {name: [] for name in names}
    jobs = [(name, seed) for seed in seeds for name in names]
    outcomes = spread(play_one, [(situation, *job) for job in jobs], n_jobs)
    for number, ((name, _), outcome) in enumerate(zip(jobs, outcomes, strict=True), start=1):
        found[name].append(outcome)
        say(f"simulating, {number} of {len(jobs)}")
    return found


def row(name: str, outcomes: Sequence[Outcome], forget_tokens_s: float = 0.0) -> dict[str, object]:
    """One controller in a table: sums of who was killed, the most that was shed in any minute, and in any time beyond
    this rate, else means."""

    def mean(value: Callable[[Outcome], float]) -> float:
        return statistics.fmean(value(each) for each in outcomes)

    return {
        "controller": name,
        "runs": len(outcomes),
        "runs_with_a_kill": sum(bool(each.killed) for each in outcomes),
        "models_killed": sum("model" in each.killed for each in outcomes),
        "neighbours_killed": sum(len([n for n in each.killed if n != "model"]) for each in outcomes),
        "peak_mib": round(max(each.peak_bytes for each in outcomes) / MIB),
        "stall_s": round(mean(lambda each: each.stall_s), 3),
        "stall_p95_s": round(quantile([each.stall_s for each in outcomes], 0.95), 3),
        "tokens_lost": round(mean(lambda each: each.forgotten_tokens), 1),
        "tokens_shed": round(mean(lambda each: sum(amount for _, amount in each.shed)), 1),
        "shed_in_a_minute": max(most_within(each.shed, 60.0) for each in outcomes),
        "shed_beyond_rate": round(max(most_beyond(each.shed, forget_tokens_s) for each in outcomes)),
        "tokens_reread": round(mean(lambda each: each.reread_tokens), 1),
        "tokens_parked": round(mean(lambda each: each.parked_tokens), 1),
        "tokens_refused": round(mean(lambda each: each.refused_tokens), 1),
        "restarts": round(mean(lambda each: each.restarts), 1),
        "tok_s": round(mean(lambda each: each.tok_s), 2),
        "context_reached": round(mean(lambda each: each.longest_context)),
    }


def figures(found: Mapping[str, Sequence[Outcome]], forget_tokens_s: float = 0.0) -> list[Figure]:
    """The same as figures, for the programs that read those of the benches."""
    units = {"peak_mib": "MiB", "stall_s": "s", "stall_p95_s": "s", "tok_s": "tok/s", "context_reached": "tokens"}
    return [
        Figure(f"{name}.{key}", float(value), units.get(key, ""))
        for name, outcomes in found.items()
        for key, value in row(name, outcomes, forget_tokens_s).items()
        if isinstance(value, (int, float))
    ]
