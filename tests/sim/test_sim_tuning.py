"""Searching settings on a simulated board: what is charged, what is tried, and the command that prints it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from kvpsi.cli.main import main
from kvpsi.cli.tune import options_of
from kvpsi.errors import UsageError
from kvpsi.governor import AdaptSettings, LawSettings
from kvpsi.governor.options import adapt_settings, law_settings
from kvpsi.sim.boards import MIB, Board
from kvpsi.sim.comparison import Compared, figures, play_with
from kvpsi.sim.controllers import Law
from kvpsi.sim.conversation import Talk
from kvpsi.sim.llms import Llm
from kvpsi.sim.play import Lost, play
from kvpsi.sim.situation import Situation
from kvpsi.sim.tuning import KILL_S, Choice, Cost, Search, cost_of, cost_with, ratio
from kvpsi.sim.workloads import WORKLOADS

LLM = Llm("small", 94 * MIB, 23040, 384, runtime_bytes=120 * MIB)
TIGHT = Situation(
    Board("600M", 600 * MIB, scope="cgroup:board"),
    LLM,
    8192,
    (("bursts", 300 * MIB),),
    talk=Talk(first_tokens=2000, think_s=1.0),
    seconds=40.0,
    learning_s=20.0,
)


def test_a_cost_is_what_was_lost_in_a_minute() -> None:
    outcome = play(TIGHT.setup(1), Law())
    nothing = dataclasses.replace(outcome, lost=Lost(0, 0, 0, 0, 0), lost_at_first=Lost(0, 0, 0, 0, 0))
    assert cost_of(TIGHT, nothing) == Cost(0, 0)
    killed = dataclasses.replace(nothing, lost=Lost(0, 0, 0, 0, 1))
    assert cost_of(TIGHT, killed) == Cost(KILL_S * 3, KILL_S * 1.5), "20 s are a third of a minute, 40 s two thirds"
    early = dataclasses.replace(nothing, lost=Lost(1.5, 0.5, 0, 0, 0), lost_at_first=Lost(1.5, 0.5, 0, 0, 0))
    assert cost_of(TIGHT, early) == Cost(0, 3)
    for lost in (Lost(0, 0, 100, 0, 0), Lost(0, 0, 0, 100, 0)):
        assert cost_of(TIGHT, dataclasses.replace(nothing, lost=lost)).whole_s > 0


def test_small_costs_are_compared_with_a_second() -> None:
    assert ratio(20, 10) == 2 and ratio(0.1, 0.0) == pytest.approx(1.1) and ratio(0, 0) == 1


def test_the_default_choice_is_the_law_as_it_is() -> None:
    assert Choice().law == LawSettings()


def test_a_search_finds_nothing_worse_than_the_default_and_the_same_again() -> None:
    search, again = (Search([TIGHT], [1], 1) for _ in range(2))
    best = search.run(most_rounds=1)
    assert best == again.run(most_rounds=1) and len(search.tried) > 10
    assert best.costs[0].later_s <= search.cost_of(Choice()).later_s
    assert best.costs[0] == cost_with(TIGHT, Law(best.choice.law), 1)
    assert all(choice.low_bytes is None or choice.low_bytes <= 150 * MIB for choice in search.tried)


def test_learning_costs_nothing_where_memory_is_never_short() -> None:
    alone = dataclasses.replace(TIGHT, neighbours=())
    assert play_with(alone, Law(adapt=AdaptSettings()), [1], 1) == play_with(alone, Law(), [1], 1) == Cost(0, 0)


def test_what_is_found_can_be_set_with_the_options_of_serve() -> None:
    choice = Choice(48 * MIB, 1.5, 0.1, 0.1, 0.4, 0.25, 0.2)
    options = options_of(choice).split()
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert law_settings(given["--reserve"], given["--regrow-above"], law=given["--law"]) == choice.law
    assert options_of(Choice()) == ""
    assert adapt_settings(True, "grow_share=0.2") == AdaptSettings(fixed=("grow_share",))
    assert adapt_settings(False, "") is None


@pytest.mark.parametrize("law", ["grow", "grow_share", "grow_share=fast", "guards=1", "low_bytes=5"])
def test_constants_that_are_none_are_refused(law: str) -> None:
    with pytest.raises(UsageError, match="--law"):
        law_settings("auto", "auto", law=law)


def test_the_figures_say_how_near_learning_comes_to_the_best_fixed_settings() -> None:
    one = Compared("one", Cost(20, 20), Cost(12, 14), Cost(10, 12), Cost(10.5, 15), Choice())
    other = dataclasses.replace(one, workload="other", online=Cost(12, 16))
    found = {figure.name: figure for figure in figures([one, other])}
    assert found["one.online_of_best"].met and not found["other.online_of_best"].met
    assert found["worst_online_of_best"].value == pytest.approx(1.2)
    assert found["mean_online_of_default"].met and found["mean_online_of_default"].value == pytest.approx(15.5 / 20)


def test_stall_from_elsewhere_is_seen_and_is_not_charged() -> None:
    noisy = dataclasses.replace(TIGHT, neighbours=(), elsewhere_share=0.2)
    outcome = play(noisy.setup(1), Law())
    assert 0.1 < outcome.stall_s / noisy.seconds < 0.3 and outcome.lost.stall_s == 0


def test_there_are_workloads_of_all_kinds() -> None:
    assert len(WORKLOADS) >= 6
    assert {each.board.swap is None for each in WORKLOADS.values()} == {True, False}
    assert any(each.elsewhere_share for each in WORKLOADS.values())


def test_the_command_prints_options(capsys: pytest.CaptureFixture[str], default_model: Path) -> None:
    words = ["tune", "--memory", "600M", "--swap", "none", "-m", str(default_model), "--neighbours", "bursts:300M"]
    words += ["--seeds", "1", "--checks", "1", "--seconds", "20", "-c", "8192", "-j", "1"]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["cost_s"]) == {"default", "tuned", "online"} and document["tried"] > 10
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "seconds lost a minute on 1 other seeds" in shown
    assert any(word in shown for word in ("kvpsi serve", "None of the", "keep the defaults"))


@pytest.mark.parametrize(
    ("words", "complaint"), [(["--seeds", "0"], "--seeds 0"), (["--checks", "0"], "--checks 0"), (["-j", "-1"], "-1")]
)
def test_numbers_that_make_no_sense_are_refused(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *words]) == 2
    assert complaint in capsys.readouterr().err
