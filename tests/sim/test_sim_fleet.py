"""A fleet: every request ends once, the law decides on each board, and routers know what balancers can know."""

from __future__ import annotations

import dataclasses
import json
import random

import numpy as np
import pytest

from kvpsi.cli import fleet as cli_fleet
from kvpsi.cli.main import main
from kvpsi.errors import UsageError
from kvpsi.governor import AdaptSettings
from kvpsi.serving import engine
from kvpsi.sim.boards import GIB, MIB, Board, Swap, board_named
from kvpsi.sim.controllers import controller_named
from kvpsi.sim.conversation import Talk, Turn
from kvpsi.sim.fleet import server as fleet_server
from kvpsi.sim.fleet.engines import Engines
from kvpsi.sim.fleet.many import figures, play_all, row, runs
from kvpsi.sim.fleet.memories import MODEL, Memories
from kvpsi.sim.fleet.play import CONTROLLERS, GOVERNED, Run, play
from kvpsi.sim.fleet.routers import ROUTERS, View, router_named
from kvpsi.sim.fleet.situation import GIVE_UP_S, MOST_ANSWER_TOKENS, Fleet, Request, Traces
from kvpsi.sim.llms import Llm, Speed, llm_named
from kvpsi.sim.memory import MISSES
from kvpsi.sim.play import Setup
from kvpsi.sim.play import play as play_one_board

LLM = Llm("small", 94 * MIB, 23040, 384, runtime_bytes=120 * MIB)
BOARD = Board("600M", 600 * MIB, scope="cgroup:board")
NEIGHBOURS = (("camera", 200 * MIB), ("browser", 130 * MIB))
FLEET = Fleet(40, BOARD, LLM, 16384, NEIGHBOURS, Talk(first_tokens=600), load=0.6, seconds=15.0)


def run_of(fleet: Fleet, controller: str = GOVERNED, router: str = "random", seed: int = 1) -> Run:
    run = Run(fleet, controller, router_named(router, seed), seed)
    run.until_all_ended()
    return run


def with_one_request(n_prompt: int, n_answer: int, fleet: Fleet = FLEET) -> Run:
    run = Run(dataclasses.replace(fleet, neighbours=()), GOVERNED, router_named("random", 1), 1)
    run.world.requests[:] = [Request(0, 0.0, n_prompt, n_answer)]
    run.to_come.clear()
    run.to_come.append(run.world.requests[0])
    return run


# -- requests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_request_ends_exactly_once(controller: str, router: str) -> None:
    fleet = dataclasses.replace(FLEET, n_boards=15, load=2.5, most_waiting=2, queue_timeout_s=5.0, seconds=8.0)
    run = run_of(fleet, controller, router)
    outcome = run.outcome(1)
    assert outcome.requests > 50 and outcome.refused > 0
    assert outcome.answered + outcome.refused + outcome.failed == outcome.requests
    assert run.view.in_flight == [0] * 15 and not run.world.engines.held.any()
    assert all(1 <= request.tries <= 2 for request in run.world.requests)
    assert all(request.tries == 2 for request in run.world.requests if request.end == "refused")
    assert len(outcome.latencies_s) == outcome.answered
    for request in run.world.requests:
        if request.end == "answered":
            assert request.ended_s is not None and request.first_s is not None
            assert request.asked_s < request.first_s <= request.ended_s


def test_requests_come_as_often_as_the_load_says() -> None:
    fleet = dataclasses.replace(FLEET, n_boards=500, seconds=60.0)
    requests = fleet.requests(1)
    expected = 0.6 * fleet.capacity * 60
    assert len(requests) == pytest.approx(expected, abs=4 * expected**0.5)
    assert np.mean([request.n_prompt for request in requests]) == pytest.approx(600, rel=0.05)
    assert all(request.n_prompt + request.n_answer <= fleet.n_ctx for request in requests)
    assert all(request.n_answer <= MOST_ANSWER_TOKENS for request in requests)
    assert [a.asked_s for a in requests] == sorted(a.asked_s for a in requests)


def test_the_same_seed_gives_the_same_whoever_computes_it() -> None:
    fleet = dataclasses.replace(FLEET, n_boards=12, seconds=5.0)
    one, other = (play_all(fleet, [GOVERNED], ["random", "pressure"], [1, 2], n_jobs) for n_jobs in (1, 2))
    assert one == other
    first, second = one[GOVERNED, "pressure"]
    assert first.latencies_s != second.latencies_s
    assert first.requests == one[GOVERNED, "random"][0].requests, "all routers are asked the same"


def test_one_request_takes_as_long_as_on_a_board_that_is_simulated_finely() -> None:
    run = with_one_request(1200, 300)
    run.until_all_ended()
    setup = Setup(BOARD, LLM, 8192, [Turn(0.0, "one", 1200, 300)], seconds=60.0, speed=FLEET.speed)
    finely = play_one_board(setup, controller_named("kvpsi"))
    weights_s = LLM.weights_bytes / BOARD.read_bytes_s  # which a server has read before it is asked anything
    assert run.outcome(1).latencies_s[0] == pytest.approx(finely.busy_s - weights_s, rel=0.05)


def test_a_client_does_not_wait_for_ever() -> None:
    board = Board("140M", 140 * MIB, read_bytes_s=1 * MIB)
    run = with_one_request(100, 100, dataclasses.replace(FLEET, board=board))
    run.until_all_ended()
    request = run.world.requests[0]
    assert request.end == "failed" and request.ended_s == pytest.approx(GIVE_UP_S, abs=0.2)
    assert run.view.in_flight == [0] * 40 and not run.world.engines.held.any()


def test_what_a_killed_model_had_to_do_fails_or_goes_elsewhere_and_it_comes_back() -> None:
    fleet = dataclasses.replace(FLEET, n_boards=2, neighbours=4 * (("camera", 120 * MIB),), load=0.0001, seconds=1.0)
    run = Run(fleet, GOVERNED, router_named("round-robin", 1), 1)
    run.world.requests[:] = [Request(number, 0.0, 100, 300) for number in range(4)]
    run.world.requests[2].n_prompt = 5000
    run.to_come.extend(run.world.requests)
    while not any(request.first_s for request in run.world.requests[:1]):
        run.step()
    memories = run.world.memories
    memories._wanted_bytes[0] = 120.0 * MIB  # until their own traces say something else
    run.step()
    run.step()
    assert run.killed == [(0, MODEL)] and not memories.is_up[0] and not run.world.engines.held[0].any()
    run.until_all_ended()
    assert [request.end for request in run.world.requests] == ["failed", "answered", "answered", "answered"]
    assert run.world.requests[2].tries == 2 and run.world.requests[2].board == 1
    while run.back_s:
        run.step()
    assert memories.is_up.all() and len(run.killed) == 1


def test_whom_two_boards_turn_away_is_refused() -> None:
    run = with_one_request(1200, 300, dataclasses.replace(FLEET, most_waiting=0))
    for server in run.servers:
        server.running = [0] * 8
    run._route()
    assert run.world.requests[0].end == "refused" and run.world.requests[0].tries == 2


def test_a_prompt_that_no_cache_holds_is_refused() -> None:
    run = with_one_request(FLEET.n_ctx, 1)
    run.until_all_ended()
    assert run.world.requests[0].end == "refused"


# -- boards --------------------------------------------------------------------------------------------------------


def test_the_law_shrinks_a_cache_for_neighbours_and_lets_it_grow_again() -> None:
    fleet = dataclasses.replace(FLEET, n_boards=2, neighbours=(("camera", 300 * MIB),), load=1.0, seconds=60.0)
    run = Run(fleet, GOVERNED, router_named("random", 1), 1)
    limits = []
    while run.to_come:
        run.step()
        limits.append(run.world.engines.limit_tokens.copy())
    changes = np.diff(limits, axis=0)
    assert (np.min(limits, axis=0) < 0.8 * fleet.n_ctx).any() and (changes < 0).any() and (changes > 0).any()
    assert not run.killed


def test_nobody_dies_beside_governed_caches_and_somebody_does_beside_static_ones() -> None:
    governed, static = (play(FLEET, controller, "random", 1) for controller in (GOVERNED, "static"))
    assert governed.models_killed == governed.neighbours_killed == 0
    assert static.models_killed > 0 and static.stall_share > governed.stall_share


def test_answers_that_are_paused_go_on_and_those_alone_forget() -> None:
    fleet = dataclasses.replace(FLEET, n_boards=2, neighbours=(), load=0.0001, seconds=1.0)
    run = Run(fleet, "static", router_named("round-robin", 1), 1)
    run.world.requests[:] = [Request(n, 0.0, 2000, 200) for n in range(4)]
    run.to_come.extend(run.world.requests)
    while not run.world.engines.written.any(axis=1).all():
        run.step()
    server, engines = run.servers[0], run.world.engines
    assert len(server.running) == 2
    engines.limit_tokens[0] = 3000
    server.shrink()
    assert len(server.running) == 1 and len(server.admission) == 1 and run.world.paused_tokens > 0
    engines.limit_tokens[0] = 1200
    run.world.floor_tokens = engines.floor_tokens()
    server.shrink()
    assert engines.held[0].sum() <= 1200 and engines.forgotten[0] > 0
    engines.limit_tokens[0] = fleet.n_ctx
    run.changed.add(0)
    run.until_all_ended()
    assert [request.end for request in run.world.requests] == ["answered"] * 4


def test_boards_fare_as_in_the_fine_simulation() -> None:
    board = dataclasses.replace(board_named("orin-nano-8gb"), swap=None)
    neighbours = (("model", 5 * GIB), ("camera", 2 * GIB))
    fleet = Fleet(8, board, llm_named("3b"), 16384, neighbours, seconds=60.0, parallel=1, queue_timeout_s=1e3)
    coarse = run_of(fleet, router="round-robin")
    assert not coarse.killed
    stall_s, forgotten = 0.0, 0
    for number in range(8):
        requests = [request for request in coarse.world.requests if request.board == number]
        turns = [Turn(each.asked_s, str(each.number), each.n_prompt, each.n_answer) for each in requests]
        hogs = [(str(n), hog) for n, hog in enumerate(fleet.neighbours_of(number, 1, 180.0))]
        setup = Setup(board, fleet.llm, fleet.n_ctx, turns, hogs, 1e3, fleet.speed, ends_with_turns=True)
        fine = play_one_board(setup, controller_named("kvpsi"))
        assert not fine.killed
        ended_s = max(request.ended_s or 0.0 for request in requests)
        assert ended_s == pytest.approx(fine.samples[-1].time_s, rel=0.2), "which has its weights to read at first"
        stall_s, forgotten = stall_s + fine.stall_s, forgotten + fine.forgotten_tokens
    assert coarse.world.stall_s.sum() == pytest.approx(stall_s, rel=0.2) and stall_s > 10
    assert coarse.world.engines.forgotten.sum() == pytest.approx(forgotten, rel=0.3)


def test_memory_that_does_not_fit_is_waited_for() -> None:
    def memories(board: Board) -> Memories:
        traces = Traces(np.zeros(1), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64), np.array([300.0 * MIB]))
        found = Memories(board, LLM, 2, 1, traces)
        for n in range(1, 7):
            found.note_uses(np.full(2, 100.0))
            assert not found.advance(0.1 * n, 0.1, np.full(2, 100.0 * MIB), np.full(2, 100.0 * MIB))
        return found

    without = memories(BOARD)
    missing = 300 + 100 + 120 + 94 - 600
    assert without.available_bytes.tolist() == [-missing * MIB, (300 - missing) * MIB]
    assert without.wait_s[0] == pytest.approx(MISSES * missing * MIB / BOARD.read_bytes_s) and without.wait_s[1] == 0
    assert without.stall_share.tolist() == [0, 0]
    swapping = memories(dataclasses.replace(BOARD, swap=Swap(300 * MIB)))
    assert swapping.wait_s[0] > 0 == swapping.wait_s[1]
    assert swapping.swapped_bytes[0] > 0 == swapping.swapped_bytes[1]
    assert swapping.stall_share[0] > 0 and swapping.available_bytes[0] > without.available_bytes[0]


@pytest.mark.parametrize(("neighbour_mib", "victim"), [(450, 0), (200, MODEL)])
def test_the_largest_is_killed_when_nothing_can_be_taken_back(neighbour_mib: int, victim: int) -> None:
    traces = Traces(
        np.zeros(1), np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64), np.array([neighbour_mib * 1e6])
    )
    memories = Memories(BOARD, LLM, 2, 1, traces)
    cache = np.full(2, (500 - neighbour_mib) * float(MIB) + 10 * MIB)
    killed = [each for n in range(1, 8) for each in memories.advance(0.1 * n, 0.1, cache * memories.is_up, cache)]
    assert killed[0] == (1, victim) and killed.count((1, victim)) == 1
    assert bool(memories.is_up[1]) == (victim != MODEL)


def test_answers_at_once_share_the_reading_of_the_weights() -> None:
    speed = Speed(0.1, 0.0, 0.01, 0.0)
    engines = Engines(2, 8, 1000, LLM, speed)
    engines.begin(0, 0, 0, 50, 0)
    for number in range(8):
        engines.begin(1, number, 0, 50, 0)
    engines.advance(1.0, np.zeros(2), np.zeros(2))
    assert engines.written[0].sum() == pytest.approx(10.0)
    assert engines.written[1].sum() == pytest.approx(8 / 0.17)
    engines.advance(1.0, np.zeros(2), np.full(2, 0.1))
    assert engines.written[0].sum() == pytest.approx(15.0), "it waits as long as it computes"


# -- routers -------------------------------------------------------------------------------------------------------


def view(n_boards: int = 100) -> View:
    found = View(n_boards, 8)
    found.limit_tokens[:] = 8192
    return found


def share_to(name: str, known: View, boards: range) -> float:
    router, request = router_named(name, 1), Request(0, 0.0, 600, 100)
    return sum(router.choose(request, known) in boards for _ in range(2000)) / 2000


@pytest.mark.parametrize("what", ["stall", "room"])
def test_only_the_router_that_knows_pressure_sends_less_to_pressed_boards(what: str) -> None:
    known = view()
    if what == "stall":
        known.pressure[:50] = 0.6
    else:
        known.limit_tokens[:50] = 1000
    shares = {name: share_to(name, known, range(50)) for name in ROUTERS}
    assert all(shares[name] == pytest.approx(0.5, abs=0.05) for name in ("random", "round-robin", "least-loaded"))
    assert shares["pressure"] == pytest.approx(0.25, abs=0.05), "only where both of two are pressed"


@pytest.mark.parametrize("name", ROUTERS)
def test_boards_that_are_not_ready_or_refused_just_now_get_nothing(name: str) -> None:
    known = view()
    known.is_ready[:50] = [False] * 50
    assert share_to(name, known, range(50)) < 0.02
    router, request = router_named(name, 1), Request(0, 0.0, 600, 100)
    assert all(router.choose(request, view(2), avoided=1) == 0 for _ in range(20))


@pytest.mark.parametrize("name", ["least-loaded", "pressure"])
def test_two_choices_even_the_load_out(name: str) -> None:
    known, router = view(), router_named(name, 1)
    for _ in range(1000):
        known.in_flight[router.choose(Request(0, 0.0, 600, 100), known)] += 1
    random_in_flight = [0] * 100
    rng = random.Random(1)
    for _ in range(1000):
        random_in_flight[rng.randrange(100)] += 1
    assert max(known.in_flight) <= 13 < max(random_in_flight)


def test_what_a_router_knows_is_as_old_as_the_last_poll() -> None:
    run = Run(dataclasses.replace(FLEET, n_boards=20, poll_s=2.0), GOVERNED, router_named("pressure", 1), 1)
    for _ in range(20):
        run.step()
    for server in run.servers:
        server.pressure = 0.5
    changed = []
    for _ in range(20):
        run._poll()
        changed.append(int((run.view.pressure == 0.5).sum()))
        run.tick += 1
    assert changed == list(range(1, 21))


def test_the_router_that_knows_pressure_avoids_it() -> None:
    neighbours = (("model", 5 * GIB), ("camera", 2 * GIB))
    talk = Talk(first_tokens=100)
    fleet = Fleet(60, board_named("orin-nano-8gb"), llm_named("3b"), 16384, neighbours, talk, load=0.5, seconds=30.0)
    found = play_all(fleet, [GOVERNED], ["least-loaded", "pressure"], [1, 2], 1)
    blind, seeing = (row(found[GOVERNED, name]) for name in ("least-loaded", "pressure"))
    assert float(str(blind["sent_short_share"])) > 0.1
    assert float(str(seeing["sent_short_share"])) < 0.8 * float(str(blind["sent_short_share"]))


def test_what_is_written_twice_agrees() -> None:
    """The simulator loads no server, and `--help` no simulator."""
    assert fleet_server._LOOKED_AT == engine._LOOKED_AT
    assert fleet_server._FIRST_TOKEN_WEIGHT == engine._FIRST_TOKEN_WEIGHT
    assert cli_fleet.ROUTERS.split(",") == list(ROUTERS)


def test_a_fleet_learns_what_its_boards_show() -> None:
    fleet = dataclasses.replace(FLEET, n_boards=4, seconds=5.0)
    learning = run_of(dataclasses.replace(fleet, adapt=AdaptSettings()))
    settings = [each.governor.settings for each in learning.servers if each.governor is not None]
    assert len(settings) == 4 and all(each != fleet.law for each in settings)
    assert all(each.governor is not None and each.governor.settings == fleet.law for each in run_of(fleet).servers)


def test_work_grows_with_the_number_of_boards() -> None:
    few, many = (
        play(dataclasses.replace(FLEET, n_boards=n, seconds=10.0, talk=Talk(first_tokens=100)), GOVERNED, "pressure", 1)
        for n in (30, 120)
    )
    assert many.events / few.events == pytest.approx(4.0, rel=0.25)


# -- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"n_boards": 1}, "--fleet 1 makes no sense"),
        ({"load": 0.0}, "--load 0"),
        ({"load": float("nan")}, "--load nan"),
        ({"seconds": 1e5}, "--seconds 100000"),
        ({"poll_s": 0.0}, "--poll-s 0"),
        ({"parallel": 0}, "a place for one answer"),
    ],
)
def test_fleets_that_make_no_sense(changes: dict[str, float], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        dataclasses.replace(FLEET, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--fleet", "10", "--routers", "best"], "Routers are random, round-robin"),
        (["--fleet", "10", "--routers", ","], "not none"),
        (["--fleet", "10", "--controllers", "avg10"], "Controllers of a fleet are kvpsi, safe, static, not avg10"),
        (["--fleet", "10", "--conversations", "3", "--think-s", "2"], "--conversations, --think-s cannot be used"),
        (["--fleet", "-3"], "--fleet -3 makes no sense"),
        (
            ["--fleet", "10", "--neighbours", "ramp:1G"],
            "Neighbours of a fleet are camera, bursts, browser",
        ),
        (["--load", "0.5"], "--load cannot be used without --fleet"),
        (["--fleet", "10", "--controllers", "safe", "--neighbours", "camera:4G"], "Even without a cache"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *arguments, "-j", "1", "--seeds", "1"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert complaint in told[-1] and len(told) <= 2


def test_the_command_prints_a_column_for_each_router_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--fleet", "10", "--board", "orin-nano-8gb", "--neighbours", "camera:2G", "--seconds", "5"]
    words += ["--first-tokens", "200", "--seeds", "2", "-j", "1", "--routers", "least-loaded,pressure"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "10 boards that can answer" in shown and "latency p99 s" in shown
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [line["router"] for line in document["table"]] == ["least-loaded", "pressure"]
    assert len(document["runs"]) == 4 and document["fleet"]["n_boards"] == 10
    names = {figure["name"] for figure in document["figures"]}
    assert {"kvpsi.pressure.latency_p99_s", "kvpsi.least-loaded.refused_share"} <= names


def test_rows_add_counts_and_average_the_rest() -> None:
    outcome = play(dataclasses.replace(FLEET, n_boards=4, seconds=3.0), GOVERNED, "random", 1)
    other = dataclasses.replace(outcome, seed=2, forgotten_tokens=10, refused=outcome.requests)
    summed = row([outcome, other])
    assert summed["runs"] == 2 and summed["requests"] == 2 * outcome.requests
    assert summed["tokens_forgotten"] == outcome.forgotten_tokens + 10
    assert summed["refused_share"] == pytest.approx((outcome.refused / outcome.requests + 1) / 2, abs=1e-4)
    found = {(GOVERNED, "random"): [outcome, other]}
    assert [line["seed"] for line in runs(found)] == [1, 2]
    assert "kvpsi.random.stall_share" in {figure.name for figure in figures(found)}
