"""Latencies of all variants, and throughput over time while neighbours come and go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvpsi.bench.admission.adaptation import Adaptation
from kvpsi.bench.admission.pace import Pace
from kvpsi.bench.admission.plan import RATIO_LEVEL
from kvpsi.bench.admission.report import Cell, pooled


def plot(folder: Path, cells: Sequence[Cell], adapted: Sequence[Adaptation], paces: Sequence[Pace]) -> list[str]:
    """Draw what there is; the paths.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    for scenario in dict.fromkeys(c.scenario for c in cells):
        for loop in ("closed", "open"):
            all_of_them = [pooled(cells, scenario, v, loop) for v in dict.fromkeys(c.variant for c in cells)]
            mine = [cell for cell in all_of_them if cell]
            if mine:
                paths.append(_latencies(folder / f"latency_{scenario}_{loop}.png", mine, f"{scenario}, {loop} loop"))
    if adapted:
        paths.append(_adaptation(folder / "threads.png", adapted))
    if paces:
        paths.append(_paces(folder / "pace.png", paces))
    return paths


def _latencies(path: Path, cells: Sequence[Cell], title: str) -> str:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    for cell in cells:
        values = sorted(cell.latencies_s())
        shares = [(i + 1) / len(values) for i in range(len(values))]
        axis.step(values, shares, where="post", label=f"{cell.variant} ({len(values)})")
    axis.set(
        xscale="log",
        xlabel="latency, s",
        ylabel="share of requests",
        ylim=(0, 1),
        title=f"{title}, {RATIO_LEVEL} clients",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return str(path)


def _adaptation(path: Path, played: Sequence[Adaptation]) -> str:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), constrained_layout=True)
    first = {each.variant: each for each in reversed(played)}
    for variant, each in first.items():
        counts = each.each_second()
        axis.step(range(len(counts)), counts, where="post", label=variant)
        axis.axvspan(each.came_s, each.went_s, alpha=0.08, color="grey")
    axis.set(xlabel="seconds; neighbours compute while it is grey", ylabel="tokens a second")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return str(path)


def _paces(path: Path, paces: Sequence[Pace]) -> str:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    for pace in paces:
        for name, gaps, style in (("alone", pace.calm_s, ":"), ("beside", pace.pressed_s, "-")):
            values = sorted(1000 * gap for gap in gaps)
            shares = [(i + 1) / len(values) for i in range(len(values))]
            axis.step(values, shares, style, where="post", label=f"{pace.scenario}, {pace.variant}, {name}")
    axis.set(xscale="log", xlabel="time between two tokens of a stream, ms", ylabel="share of gaps", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return str(path)
