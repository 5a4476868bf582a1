"""Whole simulations: who is killed, what is lost, and that the same seed gives the same."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from kvpsi.errors import UsageError
from kvpsi.governor import AdaptSettings
from kvpsi.hog import HogSettings
from kvpsi.sim.boards import MIB, Board, Swap
from kvpsi.sim.controllers import CONTROLLERS, Law, controller_named
from kvpsi.sim.conversation import Talk, Turn, draw
from kvpsi.sim.llms import Llm, Speed
from kvpsi.sim.many import SAFE, controllers_in, figures, play_all, play_one, row
from kvpsi.sim.play import Outcome, Setup, play
from kvpsi.sim.situation import Situation

LLM = Llm("small", 94 * MIB, 23040, 384, runtime_bytes=120 * MIB)
SPEED = Speed(0.06, 4e-10, 0.008, 7e-11)
BOARD = Board("600M", 600 * MIB, scope="cgroup:board")
READ = (Turn(0.0, "one", 6000, 400, at_once=True),)


def setup(board: Board = BOARD, hog_mib: int = 300, rate_mib_s: float = 100.0, after_s: float = 10.0) -> Setup:
    hog = [HogSettings(hog_mib * MIB, warmup_s=after_s, rate_bytes_s=rate_mib_s * MIB, hold_s=30.0)] if hog_mib else []
    return Setup(board, LLM, 16384, READ, [("hog", each) for each in hog], 60.0, SPEED)


def outcome(name: str, what: Setup) -> Outcome:
    return play(what, controller_named(name))


def test_without_swap_the_static_cache_is_killed_and_the_governed_one_is_not() -> None:
    static, governed = outcome("static", setup()), outcome("kvpsi", setup())
    assert static.killed == ("model",)
    assert governed.killed == () and governed.forgotten_tokens > 0 and governed.stall_s < 0.2
    assert governed.written_tokens == 400 > static.written_tokens


def test_with_swap_the_static_cache_lives_and_the_neighbour_waits() -> None:
    zram = dataclasses.replace(BOARD, swap=Swap(300 * MIB))
    static, governed = outcome("static", setup(zram)), outcome("kvpsi", setup(zram))
    assert static.killed == governed.killed == ()
    assert static.neighbours_stall_s > 0.2 > governed.neighbours_stall_s


def test_alone_nothing_is_lost() -> None:
    for name in CONTROLLERS:
        alone = outcome(name, setup(hog_mib=0))
        assert alone.killed == () and alone.forgotten_tokens == alone.refused_tokens == 0, name
        assert alone.longest_context >= (6100 if name == "offload" else 6300), name


def test_it_grows_back_when_the_neighbour_has_gone() -> None:
    turns = (*READ, Turn(50.0, "one", 2000, 300))
    hog = HogSettings(300 * MIB, warmup_s=10.0, hold_s=10.0)
    found = play(Setup(BOARD, LLM, 16384, turns, (("hog", hog),), 200.0, SPEED), controller_named("kvpsi"))
    low = min(sample.cache_bytes for sample in found.samples if sample.time_s > 15)
    assert found.samples[-1].cache_bytes > 1.5 * low and found.reread_tokens == found.forgotten_tokens


def test_conversations_that_rest_go_before_anything_is_forgotten() -> None:
    turns = (Turn(0.0, "one", 3000, 10, at_once=True), Turn(1.0, "two", 3000, 300, at_once=True))
    hog = HogSettings(220 * MIB, warmup_s=10.0, hold_s=60.0)
    found = play(Setup(BOARD, LLM, 16384, turns, (("hog", hog),), 40.0, SPEED), controller_named("kvpsi"))
    assert found.killed == () and found.forgotten_tokens == 0


def test_offloading_costs_time_for_every_token() -> None:
    static, offloaded = outcome("static", setup(hog_mib=0)), outcome("offload", setup(hog_mib=0))
    assert offloaded.tok_s < static.tok_s and offloaded.peak_bytes < static.peak_bytes


def test_the_same_seed_gives_the_same() -> None:
    situation = Situation(BOARD, LLM, 8192, (("camera", 150 * MIB), ("bursts", 80 * MIB)), seconds=30.0)
    names = controllers_in(["static", "kvpsi", SAFE])
    one, other = (play_all(situation, names, [1, 2], n_jobs) for n_jobs in (1, 2))
    assert one == other and one["kvpsi"][0] != one["kvpsi"][1]
    table = [row(name, found) for name, found in one.items()]
    assert [line["controller"] for line in table] == list(names)
    assert table[1]["runs_with_a_kill"] == 0
    assert {figure.name for figure in figures(one)} >= {"kvpsi.stall_s", "safe.context_reached"}


def test_a_situation_says_whether_the_law_learns() -> None:
    situation = Situation(BOARD, LLM, 8192, (("camera", 150 * MIB), ("bursts", 180 * MIB)), seconds=30.0)
    learns = dataclasses.replace(situation, adapt=AdaptSettings())
    given, learned = (play_one(each, "kvpsi", 1) for each in (situation, learns))
    assert learned == play(learns.setup(1), Law(adapt=AdaptSettings())) != given


def test_a_safe_cache_fits_beside_all_neighbours() -> None:
    situation = Situation(BOARD, LLM, 16384, (("camera", 200 * MIB),))
    assert 0 < situation.safe_ctx() < 16384
    taken = situation.safe_ctx() * LLM.bytes_per_token + 200 * MIB + LLM.weights_bytes + LLM.runtime_bytes
    assert taken <= 0.95 * BOARD.memory_bytes
    with pytest.raises(UsageError, match="does not fit"):
        play_all(Situation(BOARD, LLM, 16384, (("camera", 500 * MIB),)), [SAFE], [1], 1)


def test_conversations_are_drawn_the_same_for_a_seed() -> None:
    turns = draw(Talk(), 200.0, 3)
    assert turns == draw(Talk(), 200.0, 3) != draw(Talk(), 200.0, 4)
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(turns))


@pytest.mark.parametrize("names", [[], ["fast"], ["kvpsi", "fast"]])
def test_unknown_controllers_are_named(names: list[str]) -> None:
    with pytest.raises(UsageError, match="Controllers are safe, static"):
        controllers_in(names)
