"""Pictures of simulations: the cache over time for the first seed, and what became of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvpsi.sim.boards import MIB
from kvpsi.sim.play import Outcome


def plot(folder: Path, found: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Draw both; the paths.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    return [str(_over_time(folder / "over_time.png", found)), str(_in_all(folder / "in_all.png", found))]


def _over_time(path: Path, found: Mapping[str, Sequence[Outcome]]) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(9, 6), constrained_layout=True)
    for name, outcomes in found.items():
        samples = outcomes[0].samples
        times = [sample.time_s for sample in samples]
        axes[0].plot(times, [sample.cache_bytes / MIB for sample in samples], label=name)
        axes[1].plot(times, [sample.stall_s for sample in samples], label=name)
    axes[0].set(ylabel="cache in memory, MiB")
    axes[1].set(ylabel="stall so far, s", xlabel="seconds")
    axes[0].legend(loc="upper left")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _in_all(path: Path, found: Mapping[str, Sequence[Outcome]]) -> Path:
    from matplotlib import pyplot

    names = list(found)
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.5), constrained_layout=True)
    axes[0].bar(names, [sum(bool(each.killed) for each in found[name]) for name in names])
    axes[0].set(title="runs with a kill")
    axes[1].boxplot([[each.stall_s for each in found[name]] for name in names])
    axes[1].set(title="stall, s")
    axes[2].boxplot([[each.longest_context for each in found[name]] for name in names])
    axes[2].set(title="longest context, tokens")
    for axis in axes[1:]:
        axis.set_xticks(range(1, len(names) + 1), names)
    for axis in axes:
        axis.tick_params(axis="x", rotation=40)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
