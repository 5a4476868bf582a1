"""What each policy costs at each share that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

_LABELS = {
    "perplexity": "perplexity, % above the whole cache",
    "after": "fact asked for before the trim, nats lost",
    "before": "fact asked for after the trim, nats lost",
}


def plot(path: Path, costs: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> str:
    """Draw one panel for each kind; the path.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(costs), figsize=(5 * len(costs), 4), constrained_layout=True, squeeze=False)
    for each, (kind, policies) in zip(axes[0], costs.items(), strict=True):
        for policy, points in policies.items():
            ordered = sorted(points)
            each.plot([kept for kept, _ in ordered], [cost for _, cost in ordered], marker="o", label=policy)
        each.set(xlabel="tokens kept, %", ylabel=_LABELS[kind])
        each.grid(alpha=0.3)
        each.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    return str(path)
