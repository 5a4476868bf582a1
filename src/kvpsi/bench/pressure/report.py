"""What came out: one row for each run, figures with targets, CSV files and a Markdown table."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import get_args

from kvpsi.bench.figures import Figure, quantile
from kvpsi.bench.pressure.plan import Plan, Variant
from kvpsi.bench.pressure.play import Run, Token
from kvpsi.bench.pressure.watch import Sample

_MIB = 1 << 20
_ALLOWED_STEP_S = 0.050
_AS_SMALL = 0.1


@dataclass(frozen=True, slots=True)
class Row:
    """One run in figures; times of tokens are those under pressure, or calm where there was no neighbour.

    ``calm_step_ms`` is the median of the tokens before the neighbour began. The other ``*_step_ms`` leave out the
    tokens during which memory was given or tokens were dropped, ``max_ms`` does not. Stalls, prunes and faults are of
    the time in which those tokens were generated. ``*_kv_cells`` have their memory committed; ``swap_mib`` is in use on
    the whole machine; ``trusted`` is false if the governed cache stopped giving.
    """

    variant: Variant
    round: int
    tokens: int
    tok_s: float
    calm_step_ms: float
    p50_step_ms: float
    p99_step_ms: float
    max_ms: float
    prunes: int
    final_kv_cells: int
    peak_kv_cells: int
    peak_rss_mib: float
    mean_rss_mib: float
    model_stall: float
    hog_stall: float
    board_stall: float
    refaults: int
    swap_mib: float
    major_faults: int
    trusted: bool
    model_killed: bool
    hog_killed: bool
    kills: int


def row_of(run: Run) -> Row:
    """The figures of one run."""
    pressed = _pressed_samples(run)
    seconds = [t.seconds for t in run.pressed]
    steps = [t.seconds for t in run.pressed if not t.gave]
    rss = [s.model_rss_bytes / _MIB for s in pressed if s.model_rss_bytes]
    cells = [t.kv_cells for t in run.pressed] or [0]
    first, last = (pressed[0], pressed[-1]) if pressed else (None, None)
    done = run.done or {}
    return Row(
        variant=run.variant,
        round=run.round_number,
        tokens=len(run.pressed),
        tok_s=len(seconds) / sum(seconds) if seconds else 0.0,
        calm_step_ms=1000 * quantile([t.seconds for t in run.calm], 0.5),
        p50_step_ms=1000 * quantile(steps, 0.5),
        p99_step_ms=1000 * quantile(steps, 0.99),
        max_ms=1000 * max(seconds, default=0.0),
        prunes=done.get("prunes", 0),
        final_kv_cells=cells[-1],
        peak_kv_cells=max(cells),
        peak_rss_mib=max(rss, default=0.0),
        mean_rss_mib=statistics.fmean(rss) if rss else 0.0,
        model_stall=_share(first, last, lambda s: s.model_stall_s),
        hog_stall=_share(first, last, lambda s: s.hog_stall_s),
        board_stall=_share(first, last, lambda s: s.board_stall_s),
        refaults=last.refaults - first.refaults if first and last else 0,
        swap_mib=max((s.swap_used_bytes for s in pressed), default=0) / _MIB,
        major_faults=done.get("major_faults", 0),
        trusted=done.get("trusted", True),
        model_killed=run.model_killed,
        hog_killed=run.hog_killed,
        kills=run.kills,
    )


def _pressed_samples(run: Run) -> list[Sample]:
    since, until = run.pressure_from_s, run.pressure_until_s
    return [s for s in run.samples if since is not None and since <= s.time_s and (until is None or s.time_s <= until)]


def _share(first: Sample | None, last: Sample | None, stall_s: Callable[[Sample], float]) -> float:
    if first is None or last is None or last.time_s <= first.time_s:
        return 0.0
    return (stall_s(last) - stall_s(first)) / (last.time_s - first.time_s)


def figures_of(runs: Sequence[Run]) -> list[Figure]:
    """The figures that the runs allow; a variant that was not run has none."""
    rows = [row_of(run) for run in runs]
    of = {v: [r for r in rows if r.variant == v] for v in get_args(Variant)}
    found: list[Figure] = []
    for variant, mine in of.items():
        if mine and variant != "calm":
            target = 0.0 if variant.startswith("kvpsi") else None
            found.append(Figure(f"{variant}.kills", float(sum(r.kills for r in mine)), "", target, "=="))
    if not of["kvpsi"]:
        return found
    unfinished = sum(r.model_killed for r in of["kvpsi"])
    found.append(Figure("kvpsi.models_without_an_end", float(unfinished), "", 0.0, "=="))
    if of["fixed"]:
        saved = 1 - _median(of["kvpsi"], "peak_rss_mib") / max(1.0, _median(of["fixed"], "peak_rss_mib"))
        found.append(Figure("peak_rss_saved", saved, "of fixed", 0.40, ">="))
    for other in ("fixed", "prune"):
        stalled = _median(of[other], "hog_stall") if of[other] else 0.0
        if stalled:  # the inverse of "so many times lower": a neighbour that never stalled has no such number
            ratio = _median(of["kvpsi"], "hog_stall") / stalled
            found.append(Figure(f"hog_stall_to_{other}", ratio, "", 0.20, "<="))
    found += _step_figures(runs, "kvpsi") + _alone_figures(runs) + _reading_figures(runs)
    for variant in get_args(Variant):
        if variant not in ("calm", "kvpsi"):  # for comparison, without a target
            found += [replace(f, name=f"{variant}.{f.name}", target=None) for f in _step_figures(runs, variant)]
    return found


def _step_figures(runs: Sequence[Run], variant: Variant) -> list[Figure]:
    """Times per token under pressure to those without a neighbour, all rounds together."""
    calm = [t.seconds for run in runs if run.variant == "calm" for t in run.pressed]
    pressed = [t for run in runs if run.variant == variant for t in run.pressed]
    if not calm or not pressed:
        return []
    steps = [t.seconds for t in pressed if not t.gave]
    worst_giving_s = max((t.seconds for t in pressed if t.gave), default=0.0)
    allowed_s = _ALLOWED_STEP_S + quantile(calm, 0.5)
    return [
        Figure("p50_to_calm", quantile(steps, 0.5) / quantile(calm, 0.5), "", 1.03, "<="),
        Figure("p99_to_calm", quantile(steps, 0.99) / quantile(calm, 0.99), "", 1.08, "<="),
        Figure("worst_giving_step", 1000 * worst_giving_s, "ms", round(1000 * allowed_s, 1), "<="),
        Figure("worst_step_to_calm", max(t.seconds for t in pressed) / max(calm), ""),
        Figure("tok_s_to_calm", _speed(pressed) / (len(calm) / sum(calm)), "", 0.80, ">="),
    ]


def _alone_figures(runs: Sequence[Run]) -> list[Figure]:
    """Times per token beside the neighbour to those after it had left, of the tokens that had as small a cache."""
    both = [(r.pressed, r.alone) for r in runs if r.variant == "kvpsi" and r.alone]
    sizes = [statistics.median(t.kv_cells for t in tokens) for _, tokens in both]
    alone = [t.seconds for _, tokens in both for t in tokens if not t.gave]
    pressed = [
        t.seconds
        for (tokens, _), size in zip(both, sizes, strict=True)
        for t in tokens
        if not t.gave and abs(t.kv_cells / size - 1) <= _AS_SMALL
    ]
    if not alone or not pressed:
        return []
    return [
        Figure("p50_to_alone", quantile(pressed, 0.5) / quantile(alone, 0.5), "", 1.03, "<="),
        Figure("p99_to_alone", quantile(pressed, 0.99) / quantile(alone, 0.99), "", 1.08, "<="),
        Figure("tokens_compared_with_alone", float(len(pressed)), ""),
    ]


def _reading_figures(runs: Sequence[Run]) -> list[Figure]:
    """How long reading took beside the neighbour, to alone with a cache as small; and how often it was stopped."""
    both = [(r.reading_pressed, r.reading_alone) for r in runs if r.variant == "kvpsi"]
    pairs = [(pressed, alone) for pressed, alone in both if pressed and alone]
    if not pairs:
        return []
    ratio = statistics.median(pressed.seconds / alone.seconds for pressed, alone in pairs)
    stops = sum(pressed.interrupts for pressed, _ in pairs)
    return [Figure("reading_to_alone", ratio, "", 1.20, "<="), Figure("reading_interrupts", float(stops), "")]


def _speed(tokens: Sequence[Token]) -> float:
    return len(tokens) / sum(t.seconds for t in tokens)


def _median(rows: Iterable[Row], name: str) -> float:
    return float(statistics.median(getattr(row, name) for row in rows))


def document_of(
    plan: Plan, runs: Sequence[Run], *, interrupted: bool, raw: Sequence[str], problems: Sequence[str]
) -> dict[str, object]:
    """All of it as one JSON-ready document."""
    return {
        "plan": {**asdict(plan), "model": plan.model.name},
        "interrupted": interrupted,
        "runs": [asdict(row_of(run)) for run in runs],
        "figures": [f.as_json() for f in figures_of(runs)],
        "problems": list(problems),
        "raw": list(raw),
    }


def markdown(rows: Sequence[Row]) -> str:
    """One line for each run."""
    columns: dict[str, Callable[[Row], str]] = {
        "variant": lambda r: r.variant,
        "round": lambda r: str(r.round),
        "tokens": lambda r: str(r.tokens),
        "tok/s": lambda r: f"{r.tok_s:.1f}",
        "p50 / p99 / max ms": lambda r: f"{r.p50_step_ms:.1f} / {r.p99_step_ms:.1f} / {r.max_ms:.0f}",
        "prunes": lambda r: str(r.prunes),
        "KV cells at the end / peak": lambda r: f"{r.final_kv_cells} / {r.peak_kv_cells}",
        "RSS MiB mean / peak": lambda r: f"{r.mean_rss_mib:.0f} / {r.peak_rss_mib:.0f}",
        "stall model / neighbour": lambda r: f"{r.model_stall:.1%} / {r.hog_stall:.1%}",
        "refaults": lambda r: str(r.refaults),
        "swap MiB": lambda r: f"{r.swap_mib:.0f}",
        "killed": lambda r: (
            " and ".join(name for name, killed in (("model", r.model_killed), ("neighbour", r.hog_killed)) if killed)
            or "nobody"
        ),
    }
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(show(row) for show in columns.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def write_files(
    folder: Path,
    plan: Plan,
    runs: Sequence[Run],
    pictures: Sequence[str] = (),
    *,
    interrupted: bool,
    problems: Sequence[str] = (),
) -> dict[str, object]:
    """Write everything into a folder; the document, which names what there is.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row_of(run) for run in runs]
    paths = [folder / name for name in ("runs.csv", "tokens.csv", "samples.csv", "table.md", "result.json")]
    _write_csv(paths[0], [f.name for f in fields(Row)], map(astuple, rows))
    tokens = (
        (run.variant, run.round_number, stretch, *astuple(token))
        for run in runs
        for stretch, some in (("calm", run.calm), ("pressed", run.pressed), ("alone", run.alone))
        for token in some
    )
    _write_csv(paths[1], ["variant", "round", "stretch", *(f.name for f in fields(Token))], tokens)
    samples = ((run.variant, run.round_number, *astuple(sample)) for run in runs for sample in run.samples)
    _write_csv(paths[2], ["variant", "round", *Sample.names()], samples)
    paths[3].write_text(markdown(rows))
    raw = [*map(str, paths), *pictures]
    document = document_of(plan, runs, interrupted=interrupted, raw=raw, problems=problems)
    paths[4].write_text(json.dumps(document, indent=2, default=str) + "\n")
    return document


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
