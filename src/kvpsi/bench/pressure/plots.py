"""One picture for each variant, all on the same axes: stall, headroom, memory and the time of every token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpsi.bench.pressure.plan import Plan
from kvpsi.bench.pressure.play import Run

_MIB = 1 << 20


def plot(folder: Path, plan: Plan, runs: Sequence[Run]) -> list[str]:
    """Draw the first run of each variant; the paths.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    first = {run.variant: run for run in reversed(runs) if run.samples}
    if not first:
        return []
    longest_s = max(r.samples[-1].time_s - r.samples[0].time_s for r in first.values())
    slowest_ms = max((1000 * t.seconds for r in first.values() for t in (*r.calm, *r.pressed)), default=1.0)
    paths = []
    for variant, run in first.items():
        path = folder / f"{variant}.png"
        _draw(path, plan, run, longest_s, slowest_ms)
        paths.append(str(path))
    return paths


def _draw(path: Path, plan: Plan, run: Run, longest_s: float, slowest_ms: float) -> None:
    from matplotlib import pyplot

    start = run.samples[0].time_s
    times = [s.time_s - start for s in run.samples]
    limit_mib = (plan.board.memory_bytes or 0) / _MIB
    figure, axes = pyplot.subplots(4, 1, sharex=True, figsize=(9, 9), constrained_layout=True)
    _stalls(axes[0], run, times)
    axes[1].plot(times, [limit_mib - s.usage_bytes / _MIB for s in run.samples])
    axes[1].set(ylabel="headroom, MiB", ylim=(0, limit_mib))
    axes[2].plot(times, [s.model_rss_bytes / _MIB for s in run.samples], label="model")
    axes[2].plot(times, [s.hog_rss_bytes / _MIB for s in run.samples], label="neighbour")
    axes[2].set(ylabel="resident, MiB", ylim=(0, limit_mib))
    axes[2].legend(loc="upper left")
    tokens = [*run.calm, *run.pressed]
    axes[3].plot([t.time_s - start for t in tokens], [1000 * t.seconds for t in tokens], ".", markersize=3)
    axes[3].set(ylabel="time per token, ms", yscale="log", ylim=(1, 1.2 * slowest_ms), xlabel="seconds")
    axes[3].set_xlim(0, longest_s)
    for each in axes:
        if run.pressure_from_s is not None:
            each.axvline(run.pressure_from_s - start, color="grey", linestyle=":")
        each.grid(alpha=0.3)
    killed = ", ".join(name for name, dead in (("model", run.model_killed), ("neighbour", run.hog_killed)) if dead)
    figure.suptitle(f"{run.variant}{f' ({killed} killed)' if killed else ''}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _stalls(axis: Any, run: Run, times: Sequence[float]) -> None:
    """Share of each second in which the model, and the neighbour, waited for memory."""
    for label, name in (("model", "model_stall_s"), ("neighbour", "hog_stall_s")):
        totals = [getattr(s, name) for s in run.samples]
        shares = []
        for i, now in enumerate(times):
            j = max(0, i - 10)
            shares.append((totals[i] - totals[j]) / (now - times[j]) if now > times[j] else 0.0)
        axis.plot(times, shares, label=label)
    axis.set(ylabel="memory stall", ylim=(0, 1))
    axis.legend(loc="upper left")
