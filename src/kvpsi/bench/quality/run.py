"""Every policy forgets the same of the same texts, and is compared with a model that forgot nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvpsi.bench.figures import Figure
from kvpsi.bench.quality import recall
from kvpsi.bench.quality.subject import Subject, open_subject, perplexity
from kvpsi.bench.quality.texts import documents, texts
from kvpsi.bench.table import Table
from kvpsi.engines.loading import usable_threads
from kvpsi.errors import UsageError
from kvpsi.kv import CacheSettings
from kvpsi.kv.policies import POLICIES

Tell = Callable[[str], None]
_NEAR_NATS = 1.0
_DRAWS = 2000
_LEAST_WHOLE_PAGES = 0.85


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        model: the GGUF file.
        text: files with text; none: what Debian's documentation packages carry.
        policies: whom to compare.
        kept: shares of the tokens that stay.
        n_tokens: of each document.
        n_documents: for the perplexity of what follows them.
        n_following: tokens that follow.
        n_haystacks: documents with facts in them.
        n_facts: in each.
        settings: what no policy may take.
        n_threads: 0: as many as can run.
        seed: of the facts.
    """

    model: Path
    text: tuple[Path, ...] = ()
    policies: tuple[str, ...] = tuple(POLICIES)
    kept: tuple[float, ...] = (0.75, 0.5, 0.25, 0.125)
    n_tokens: int = 4096
    n_documents: int = 24
    n_following: int = 256
    n_haystacks: int = 3
    n_facts: int = 16
    settings: CacheSettings = field(default_factory=CacheSettings)
    n_threads: int = 0
    seed: int = 1

    def __post_init__(self) -> None:
        unknown = [name for name in self.policies if name not in POLICIES]
        if unknown or not self.policies:
            raise UsageError(f"The policies are {', '.join(POLICIES)}, not {', '.join(unknown) or 'none'}.")
        if not self.kept or not all(0 < share < 1 for share in self.kept):
            raise UsageError("The shares that are kept lie between 0 and 1, such as 0.5.")
        if not 1 <= self.n_facts <= recall.MOST_FACTS:
            raise UsageError(f"There are 1 to {recall.MOST_FACTS} facts in a document.")
        if min(self.n_documents, self.n_haystacks) < 0 or self.n_documents + self.n_haystacks < 1:
            raise UsageError("--documents and --haystacks are 0 or more, and one of them is 1 at least.")
        if not 2 <= self.n_following <= 512 or self.n_tokens < 512:
            raise UsageError("A document has 512 tokens at least, and 2 to 512 follow.")


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: the loss in nats of what follows after a trim, and without one.

    ``kind`` is perplexity, after (the question was there before the trim) or before (it came later). For a fact the
    loss is of its number, summed over its tokens; for a document the mean of its tokens.
    """

    kind: str
    policy: str
    kept: float
    document: int
    fact: str
    loss: float
    whole_loss: float
    whole_pages_share: float

    @property
    def lost(self) -> float:
        """How much worse."""
        return self.loss - self.whole_loss


def run(plan: Plan, out_dir: Path, tell: Tell) -> dict[str, Any]:
    """The whole bench as one JSON-ready document; Ctrl-C ends it with what there is by then."""
    table = Table(out_dir / "quality.csv")
    rows: list[Row] = []
    interrupted = False
    said = texts(plan.text)
    n_ctx = -(-(plan.n_tokens + plan.n_facts * 32 + plan.n_following + 256) // 256) * 256
    with open_subject(plan.model, n_ctx, plan.n_threads or usable_threads(), plan.settings) as subject:
        tokenized = [subject.tokenize(text) for text in said]
        pieces = documents(tokenized, plan.n_documents + plan.n_haystacks, plan.n_tokens + plan.n_following)
        try:
            for row in _rows(plan, subject, pieces, tell):
                rows.append(row)
                table.add(asdict(row))
        except KeyboardInterrupt:
            interrupted = True
        scorings = subject.scorings
    problems = list(table.problems)
    return {
        "plan": {**asdict(plan), "model": plan.model.name},
        "interrupted": interrupted,
        "policies": summary(rows, plan.seed),
        "figures": [f.as_json() for f in [*figures_of(rows), *_costs(scorings)]],
        "problems": problems,
        "raw": [*table.paths, *_plots(out_dir, rows, problems)],
    }


def _rows(plan: Plan, subject: Subject, pieces: Sequence[Sequence[int]], tell: Tell) -> Iterator[Row]:
    for number, piece in enumerate(pieces[: plan.n_documents]):
        tell(f"document {number + 1} of {plan.n_documents}")
        yield from _following(plan, subject, number, piece)
    for number, piece in enumerate(pieces[plan.n_documents :]):
        tell(f"facts in document {number + 1} of {plan.n_haystacks}")
        yield from _facts(plan, subject, number, piece[: plan.n_tokens])


def _trims(plan: Plan) -> Iterator[tuple[str, float]]:
    return ((policy, kept) for kept in plan.kept for policy in plan.policies)


def _following(plan: Plan, subject: Subject, number: int, piece: Sequence[int]) -> Iterator[Row]:
    """The perplexity of what follows a document."""
    subject.clear()
    subject.read(piece[: plan.n_tokens - 1])
    held = subject.save()
    rest = piece[plan.n_tokens - 1 : plan.n_tokens + plan.n_following]
    whole = statistics.mean(subject.losses(rest, plan.n_following))
    for policy, kept in _trims(plan):
        subject.load(held)
        whole_pages_share = subject.forget(policy, kept)
        loss = statistics.mean(subject.losses(rest, plan.n_following))
        yield Row("perplexity", policy, kept, number, "", loss, whole, whole_pages_share)
    held.state.close()


def _facts(plan: Plan, subject: Subject, number: int, document: Sequence[int]) -> Iterator[Row]:
    """What is still known of the facts in a document."""
    facts = recall.draw(plan.n_facts, plan.seed + number)
    subject.clear()
    subject.read(recall.plant(document, [subject.tokenize(fact.sentence) for fact in facts]))
    read = subject.save()
    for fact in facts:
        question, answer = subject.tokenize(fact.question), subject.tokenize(fact.answer)
        number_of = subject.tokenize(f" {fact.number}")
        subject.load(read)
        subject.read(question)
        asked = subject.save()
        whole = sum(subject.losses(answer + number_of, len(number_of)))
        for policy, kept in _trims(plan):
            for kind, held, rest in (("after", asked, answer), ("before", read, question + answer)):
                subject.load(held)
                whole_pages_share = subject.forget(policy, kept)
                loss = sum(subject.losses(rest + number_of, len(number_of)))
                yield Row(kind, policy, kept, number, fact.thing, loss, whole, whole_pages_share)
        asked.state.close()
    read.state.close()


def _of(rows: Sequence[Row], kind: str, policy: str, kept: float) -> list[Row]:
    return [r for r in rows if (r.kind, r.policy, r.kept) == (kind, policy, kept)]


def _groups(rows: Sequence[Row]) -> list[tuple[str, str, float]]:
    return list(dict.fromkeys((r.kind, r.policy, r.kept) for r in rows))


def perplexity_rise(rows: Sequence[Row]) -> float:
    """By which share the perplexity of all documents together rose."""
    return perplexity([r.loss for r in rows]) / perplexity([r.whole_loss for r in rows]) - 1


def near_share(rows: Sequence[Row]) -> float:
    """The share of facts within one nat of the model that forgot nothing."""
    return statistics.mean(r.lost <= _NEAR_NATS for r in rows)


def interval(rows: Sequence[Row], value: Callable[[Sequence[Row]], float], seed: int) -> tuple[float, float]:
    """The 95 % confidence interval of a value, by drawing the rows again and again."""
    rng = np.random.default_rng(seed)
    drawn = [value([rows[i] for i in rng.integers(0, len(rows), len(rows))]) for _ in range(_DRAWS)]
    return float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def summary(rows: Sequence[Row], seed: int) -> list[dict[str, object]]:
    """Each policy at each share, for people."""
    found: list[dict[str, object]] = []
    for kind, policy, kept in _groups(rows):
        mine = _of(rows, kind, policy, kept)
        value = perplexity_rise if kind == "perplexity" else _mean_lost
        low, high = interval(mine, value, seed)
        row: dict[str, object] = {"kind": kind, "policy": policy, "kept": kept, "n": len(mine)}
        if kind == "perplexity":
            row |= {"perplexity_rise": value(mine)}
        else:
            row |= {"lost_nats": value(mine), "near_share": near_share(mine)}
        row |= {"low": low, "high": high}
        row |= {"whole_pages_share": statistics.mean(r.whole_pages_share for r in mine)}
        found.append(row)
    return found


def _mean_lost(rows: Sequence[Row]) -> float:
    return statistics.mean(r.lost for r in rows)


_RECALL_TARGETS = {0.5: (0.5, 0.90), 0.25: (1.0, 0.85)}


def figures_of(rows: Sequence[Row]) -> list[Figure]:
    """What ``auto`` is to reach, and streaming beside it."""
    found: list[Figure] = []
    for kind, policy, kept in _groups(rows):
        mine = _of(rows, kind, policy, kept)
        name = f"{policy}.{kind}.kept_{100 * kept:g}"
        auto = policy == "auto"
        if kind == "perplexity":
            rise = perplexity_rise(mine)
            found.append(Figure(f"{name}.perplexity_rise", rise, "", 0.02 if auto and kept == 0.75 else None))
            streaming = _of(rows, kind, "streaming", kept)
            if auto and streaming:
                points = perplexity([r.loss for r in mine]) - perplexity([r.loss for r in streaming])
                found.append(Figure(f"{name}.points_above_streaming", points, "", 1.0))
        else:
            targets = _RECALL_TARGETS.get(kept) if auto and kind == "after" else None
            most_lost, least_near = targets or (None, None)
            found.append(Figure(f"{name}.lost", _mean_lost(mine), "nat", most_lost))
            found.append(Figure(f"{name}.near_share", near_share(mine), "", least_near, ">="))
    if mine := [r for r in rows if r.policy == "auto"]:
        share = statistics.mean(r.whole_pages_share for r in mine)
        found.append(Figure("auto.whole_pages_share", share, "", _LEAST_WHOLE_PAGES, ">="))
    return found


def _costs(scorings: Sequence[tuple[float, float]]) -> list[Figure]:
    """How long it takes to find out what a question attends to."""
    if not scorings:
        return []
    together, longest = (1000 * max(each) for each in zip(*scorings, strict=True))
    median = 1000 * statistics.median(each for each, _ in scorings)
    return [
        Figure("scoring.median", median, "ms", 150.0),
        Figure("scoring.longest", together, "ms"),
        Figure("scoring.longest_step", longest, "ms", 20.0),
    ]


def _plots(folder: Path, rows: Sequence[Row], problems: list[str]) -> list[str]:
    try:
        from kvpsi.bench.quality.plots import plot

        return [plot(folder / "quality.png", summary_for_plot(rows))] if rows else []
    except ImportError:
        problems.append("The plot was not drawn, as matplotlib is not installed: `pip install kvpsi[bench]` does that.")
    except OSError as error:
        problems.append(f"The plot cannot be written ({error}).")
    return []


def summary_for_plot(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """For each kind and policy the points (share kept, what it cost)."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for kind, policy, kept in _groups(rows):
        mine = _of(rows, kind, policy, kept)
        value = 100 * perplexity_rise(mine) if kind == "perplexity" else _mean_lost(mine)
        found.setdefault(kind, {}).setdefault(policy, []).append((100 * kept, value))
    return found
