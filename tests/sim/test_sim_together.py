"""Several governed models on one simulated board: who comes to which share, how calmly, and that nobody dies."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from kvpsi.cli.main import main
from kvpsi.errors import UsageError
from kvpsi.governor import AdaptSettings, LawSettings
from kvpsi.governor.shares import ShareSettings
from kvpsi.hog import HogSettings
from kvpsi.sim.boards import MIB, Board
from kvpsi.sim.conversation import Talk, Turn
from kvpsi.sim.llms import Llm, Speed
from kvpsi.sim.situation import Situation
from kvpsi.sim.together.many import TOLERANCE, figures, play_drawn, row
from kvpsi.sim.together.play import TogetherOutcome, play_together
from kvpsi.sim.together.situation import Drawn, Tenant, Together
from kvpsi.sim.together.swings import swings

LLM = Llm("small", 94 * MIB, 23040, 384, runtime_bytes=120 * MIB)
SPEED = Speed(0.05, 4e-11, 0.001, 2e-12)
BOARD = Board("800M", 800 * MIB, scope="cgroup:board")
LARGE = Board("4G", 4096 * MIB, scope="cgroup:board")


def tenant(n: int, share: ShareSettings, at_s: float = 0.0) -> Tenant:
    """One that reads more than fits, and writes for as long as it is watched."""
    return Tenant(f"model {n}", LLM, 32768, (Turn(at_s, "one", 31000, 20000),), share, SPEED)


def hog(mib: int, after_s: float = 1.0, rate_mib_s: float = 100.0, hold_s: float = 200.0) -> tuple[str, HogSettings]:
    return "hog", HogSettings(mib * MIB, warmup_s=after_s, rate_bytes_s=rate_mib_s * MIB, hold_s=hold_s)


def worst(outcome: TogetherOutcome) -> tuple[float, float]:
    """The largest error of a share, and how often a limit turned round in ten seconds."""
    return max(each.error for each in outcome.tenants), max(each.swings for each in outcome.tenants)


def test_sixteen_with_weights_come_to_their_shares_and_stay() -> None:
    tenants = tuple(tenant(n, ShareSettings(1 + n % 4)) for n in range(16))
    setup = Together(LARGE, tenants, (hog(600),), 40.0)
    outcome = play_together(setup)
    error, turned = worst(outcome)
    assert outcome.killed == () and outcome.stall_s == 0 and outcome.short_share > 0.8
    assert error <= TOLERANCE and turned <= 1
    by_weight = [sum(each.held_bytes for each in outcome.tenants if each.weight == w) for w in (1, 2, 3, 4)]
    assert [each / by_weight[0] for each in by_weight] == pytest.approx([1, 2, 3, 4], rel=0.1)
    alone = play_together(dataclasses.replace(setup, shares=False))
    assert worst(alone)[0] > 0.5, "what they come to without knowing of each other"


def test_when_a_neighbour_comes_they_give_their_parts_and_nobody_dies() -> None:
    tenants = tuple(tenant(n, ShareSettings(1 + n % 4)) for n in range(16))
    outcome = play_together(Together(LARGE, tenants, (hog(600, 15.0, 400.0),), 40.0, settling_s=25.0))
    assert outcome.killed == () and outcome.stall_s == 0
    assert worst(outcome)[0] <= TOLERANCE and worst(outcome)[1] == 0
    assert outcome.least_headroom_bytes > 100 * MIB, "the reserve is 205 MiB"


@pytest.mark.parametrize(("priority", "weight"), [(0, 2.0), (1, 1.0)])
def test_a_newcomer_has_its_share_after_ten_seconds(priority: int, weight: float) -> None:
    tenants = tenant(1, ShareSettings()), tenant(2, ShareSettings(weight, priority), at_s=15.0)
    outcome = play_together(Together(BOARD, tenants, (hog(200),), 40.0, settling_s=25.0 if not priority else 35.0))
    old, new = outcome.tenants
    assert outcome.killed == () and new.error <= TOLERANCE and old.swings == new.swings == 0
    assert new.held_bytes > 1.7 * old.held_bytes


def test_what_is_drawn_is_the_same_for_a_seed() -> None:
    talk = Talk(1, 3000, 500, 300, 1.0)
    situation = Situation(BOARD, LLM, 8192, (("bursts", 80 * MIB),), talk=talk, seconds=20.0)
    drawn = Drawn(situation, 3, (1.0, 2.0))
    one, other = play_drawn(drawn, 1), play_drawn(drawn, 2)
    assert one == play_drawn(drawn, 1) != other and one.killed == other.killed == ()
    assert [each.weight for each in one.tenants] == [1.0, 2.0, 1.0]
    assert row("model 1", [one.tenants[0], other.tenants[0]])["killed"] == 0
    assert {figure.name for figure in figures([one, other])} >= {"worst_share_error", "most_swings", "killed"}


def test_a_swing_is_a_turn_that_is_large_enough() -> None:
    assert swings([], 1) == swings([5], 1) == swings([1, 5, 9, 9], 1) == 0
    assert swings([0, 10, 0, 10], 5) == 2
    assert swings([0, 10, 6, 10, 6], 5) == 0
    assert swings([10, 8, 6, 3, 5, 7, 9, 3], 5) == 2
    assert swings([0, 3, 2, 5, 4, 7, 6, 1], 5) == 1


def test_what_cannot_be_is_refused() -> None:
    one = tenant(1, ShareSettings())
    with pytest.raises(UsageError, match="--seconds"):
        Together(BOARD, (one,), seconds=5.0)
    with pytest.raises(UsageError, match="no model"):
        Together(BOARD, ())
    with pytest.raises(UsageError, match="same name"):
        Together(BOARD, (one, one))
    with pytest.raises(UsageError, match="stall from elsewhere"):
        Drawn(Situation(BOARD, LLM, 8192, elsewhere_share=0.1), 2)


def test_what_a_situation_says_holds_for_each_model() -> None:
    trace = HogSettings(50 * MIB, hold_s=30.0)
    law, adapt = LawSettings(lookahead_s=0.1), AdaptSettings()
    situation = Situation(BOARD, LLM, 8192, (("bursts", 80 * MIB),), trace, seconds=20.0, law=law, adapt=adapt)
    board = Drawn(situation, 2).together(3)
    assert [(each.law, each.adapt) for each in board.tenants] == [(law, adapt)] * 2
    assert list(board.neighbours) == list(situation.setup(3).neighbours) and board.neighbours[-1] == ("trace", trace)


def test_models_that_learn_are_played_otherwise() -> None:
    given = tuple(tenant(n, ShareSettings()) for n in range(2))
    learn = tuple(dataclasses.replace(each, adapt=AdaptSettings()) for each in given)
    board = Board("2G", 2048 * MIB, scope="cgroup:board")
    outcomes = [play_together(Together(board, each, (hog(1200),), 15.0)) for each in (given, learn)]
    assert outcomes[0].least_headroom_bytes > 80 * MIB > outcomes[1].least_headroom_bytes, "reserves of 102 and 48"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--models", "0"], "--models 0"),
        (["--models", "2", "--weights", "1,x"], "--weights 1,x"),
        (["--models", "2", "--weights", "0"], "weight of 0"),
        (["--models", "2", "--priorities", "5000"], "priority of 5000"),
        (["--models", "2", "--seconds", "5"], "--seconds"),
        (["--weights", "1,2"], "--weights cannot be used without --models"),
        (["--models", "2", "--out-dir", "x", "--trace", "x"], "--out-dir, --trace cannot be used with --models"),
        (["--models", "2", "--fleet", "5"], "--fleet and --models cannot be used together"),
        (["--validate", "x", "--seeds", "3"], "--seeds cannot be used with --validate"),
    ],
)
def test_wrong_words_are_one_sentence(options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *options]) == 2
    told = capsys.readouterr().err.strip()
    assert complaint in told and told.count("\n") == 0


def test_the_command_prints_each_model_and_figures(capsys: pytest.CaptureFixture[str], default_model: Path) -> None:
    words = [
        "simulate",
        "--memory",
        "900M",
        "-m",
        str(default_model),
        "-c",
        "8192",
        "--models",
        "3",
        "--weights",
        "1,2",
    ]
    words += ["--neighbours", "bursts:60M", "--seeds", "2", "--seconds", "15", "-j", "1"]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(line["name"], line["weight"]) for line in document["table"]] == [
        ("model 1", 1.0),
        ("model 2", 2.0),
        ("model 3", 1.0),
    ]
    assert {figure["name"] for figure in document["figures"]} >= {"worst_share_error", "killed"}
    assert main(words) == 0
    assert "worst_share_error" in capsys.readouterr().out
