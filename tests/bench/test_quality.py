"""The whole bench on a real model, small; and its parts."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from kvpsi.bench.quality import recall
from kvpsi.bench.quality.run import Plan, Row, figures_of, interval, near_share, perplexity_rise, run
from kvpsi.bench.quality.texts import documents, texts
from kvpsi.errors import UsageError
from kvpsi.kv import CacheSettings

TEXT = Path(__file__).parents[2] / "docs" / "command-line.md"


def row(kind: str, policy: str, kept: float, loss: float, whole: float = 1.0, share: float = 1.0) -> Row:
    return Row(kind, policy, kept, 0, "", loss, whole, share)


def test_texts_may_be_compressed_and_have_to_be_there(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "b.txt").write_text("plain")
    assert texts([tmp_path / "a.gz", tmp_path / "b.txt"]) == ["packed", "plain"]
    with pytest.raises(UsageError, match="--text"):
        texts([tmp_path / "missing"])


def test_documents_are_spread_and_do_not_overlap() -> None:
    found = documents([list(range(100)), list(range(100, 130))], 4, 20)
    assert [len(each) for each in found] == [20] * 4 and len({t for each in found for t in each}) == 80
    with pytest.raises(UsageError, match="more text"):
        documents([list(range(100))], 6, 20)


def test_facts_are_planted_in_the_middle_and_nothing_else_is_lost() -> None:
    planted = recall.plant(list(range(100)), [[-1], [-2]])
    assert [t for t in planted if t >= 0] == list(range(100))
    assert planted.index(-1) == 25 and planted.index(-2) == 76
    assert recall.draw(16, 3) == recall.draw(16, 3) != recall.draw(16, 4)
    assert len({fact.thing for fact in recall.draw(recall.MOST_FACTS, 1)}) == recall.MOST_FACTS


def test_figures_compare_with_a_model_that_forgot_nothing() -> None:
    rows = [row("after", "auto", 0.5, loss) for loss in (1.0, 1.5, 1.9, 4.0)]
    assert near_share(rows) == 0.75
    low, high = interval(rows, near_share, 1)
    assert low <= 0.75 <= high and low < high
    rows += [row("perplexity", "auto", 0.75, 1.01), row("perplexity", "streaming", 0.75, 1.0)]
    assert perplexity_rise([rows[-2]]) == pytest.approx(0.01005, abs=1e-4)
    met = {f.name: f.met for f in figures_of(rows)}
    assert met["auto.after.kept_50.lost"] is False and met["auto.after.kept_50.near_share"] is False
    assert met["auto.perplexity.kept_75.perplexity_rise"] is True
    assert met["auto.perplexity.kept_75.points_above_streaming"] is True
    assert met["streaming.perplexity.kept_75.perplexity_rise"] is None


@pytest.mark.engine
def test_every_policy_is_measured_and_a_question_helps(default_model: Path, tmp_path: Path) -> None:
    settings = CacheSettings(keep=16, tail=64)
    policies = ("auto", "streaming")
    plan = Plan(default_model, (TEXT,), policies, (0.5,), 700, 1, 64, 1, 3, settings=settings, n_threads=1)
    said = run(plan, tmp_path, lambda _: None)
    figures = {f["name"]: f["value"] for f in said["figures"]}
    assert figures["auto.perplexity.kept_50.points_above_streaming"] == 0.0, "no question is pending"
    assert figures["auto.after.kept_50.lost"] < figures["streaming.after.kept_50.lost"]
    assert figures["scoring.longest_step"] > 0 and not said["problems"]
    assert {Path(p).name for p in said["raw"]} == {"quality.csv", "quality.png"}
    assert len((tmp_path / "quality.csv").read_text().splitlines()) == 1 + 2 + 3 * 2 * 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"policies": ("best",)}, "auto, streaming"),
        ({"kept": (1.0,)}, "between 0 and 1"),
        ({"n_tokens": 100}, "512 tokens"),
        ({"n_facts": 99}, "24"),
        ({"n_documents": 0, "n_haystacks": 0}, "one of them"),
    ],
)
def test_plans_that_cannot_be_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Plan(Path("model.gguf"), **options)
