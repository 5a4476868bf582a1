"""The balloon in vLLM's block pool: what is in it, what is out, and that no block is ever in two places."""

from __future__ import annotations

import random
import threading

import pytest

from kvpsi.engines.vllm.balloon import Balloon, BalloonSettings
from kvpsi.engines.vllm.layout import Run, runs_of
from kvpsi.errors import EnvironmentProblem
from support.pools import FakeBlock, FakePool

SIZE = 1000


class Machine:
    """Memory of blocks: which of them hold some, and a clock."""

    def __init__(self, n_blocks: int = 41, **settings: int) -> None:
        self.now_s = 0.0
        self.pool = FakePool(n_blocks)
        self.held = set(range(1, n_blocks))
        self.fails = False
        self.released: list[Run] = []
        self.provided: list[list[Run]] = []
        self.balloon = Balloon(
            self.pool,
            BalloonSettings(**{"block_bytes": SIZE, "floor_blocks": 5, **settings}),
            self.release,
            provide=self.provide,
            clock=lambda: self.now_s,
        )

    def provide(self, runs: list[Run]) -> None:
        if self.fails:
            raise EnvironmentProblem("a worker is gone")
        self.provided.append(runs)

    def release(self, runs: list[Run]) -> int:
        if self.fails:
            raise EnvironmentProblem("a worker is gone")
        self.released = runs
        gone = {i for first, end in runs for i in range(first, end)}
        free = {block.block_id for block in self.pool.queue}
        assert not gone & free, "what is being given back is vLLM's at the same time"
        before = len(self.held)
        self.held -= gone
        return (before - len(self.held)) * SIZE

    def write(self, n_blocks: int) -> list[FakeBlock]:
        with self.balloon.lock:
            blocks = self.pool.use(n_blocks)
            ids = [block.block_id for block in blocks]
            self.balloon.written(ids)
        self.held.update(ids)
        return blocks

    def end(self, blocks: list[FakeBlock], cached: bool = False) -> None:
        with self.balloon.lock:
            for block in blocks:
                block.block_hash = f"text {block.block_id}" if cached else None
            self.pool.free_blocks(blocks)


@pytest.fixture
def machine() -> Machine:
    started = Machine()
    started.balloon.settle()
    return started


def test_nothing_is_resident_after_the_start_and_all_blocks_are_in_the_pool(machine: Machine) -> None:
    status = machine.balloon.status()
    assert not machine.held and status.used_bytes == 0
    assert status.capacity_bytes == status.returned_bytes == 40 * SIZE
    assert machine.pool.get_num_free_blocks() == 40
    assert machine.released == [(1, 41)]


def test_memory_is_found_once_for_blocks_that_had_none(machine: Machine) -> None:
    blocks = machine.write(3)
    machine.balloon.provide_fresh()
    with machine.balloon.lock:
        machine.balloon.written([block.block_id for block in blocks])
    machine.balloon.provide_fresh()
    assert machine.provided == [runs_of(sorted(block.block_id for block in blocks))]


def test_memory_is_found_ahead_also_where_not_all_blocks_fit(machine: Machine) -> None:
    machine.balloon.set_limit(20 * SIZE, None)
    machine.write(3)
    machine.balloon.provide_fresh()
    assert machine.provided


def test_no_memory_is_found_ahead_while_it_is_short_or_something_has_to_go(machine: Machine) -> None:
    machine.balloon.set_limit(40 * SIZE, 64)
    machine.write(3)
    machine.balloon.provide_fresh()
    machine.balloon.set_limit(40 * SIZE, None)
    machine.balloon.provide_fresh()
    blocks = machine.write(10)
    machine.balloon.set_limit(8 * SIZE, None)
    machine.balloon.provide_fresh()
    machine.end(blocks, cached=True)
    machine.balloon.shrink()
    machine.write(1)
    machine.balloon.provide_fresh()
    assert not machine.provided


def test_the_one_that_only_has_one_size_finds_none_ahead_while_memory_is_short() -> None:
    machine = Machine(floor_blocks=40)
    machine.balloon.settle()
    machine.balloon.set_limit(0, 64)
    machine.write(3)
    machine.balloon.provide_fresh()
    assert not machine.provided


def test_what_has_to_go_waits_for_a_piece_only() -> None:
    machine = Machine(block_bytes=16 << 20)
    machine.balloon.settle()
    machine.write(5)
    provide = machine.balloon._provide

    def note(runs: list[Run]) -> None:
        provide(runs)
        if len(machine.provided) == 2:
            machine.balloon.set_limit(40 * (16 << 20), 64)

    machine.balloon._provide = note
    machine.balloon.provide_fresh()
    assert [sum(end - first for first, end in runs) for runs in machine.provided] == [2, 2], "the fifth is not found"


def test_no_memory_is_found_ahead_for_blocks_that_went(machine: Machine) -> None:
    machine.end(machine.write(2))
    machine.now_s = 10
    machine.balloon.settle()
    machine.now_s = 20
    machine.balloon.settle()
    machine.balloon.provide_fresh()
    assert not machine.provided


def test_a_worker_that_is_gone_when_memory_is_to_be_found_leaves_all_blocks_to_the_engine(machine: Machine) -> None:
    machine.balloon.set_limit(5 * SIZE, None)
    machine.write(3)
    machine.fails = True
    machine.balloon.provide_fresh()
    assert machine.balloon.problem == "a worker is gone"
    assert machine.pool.get_num_free_blocks() == 37


def test_what_is_empty_leaves_the_pool_at_once(machine: Machine) -> None:
    blocks = machine.write(8)
    machine.balloon.set_limit(10 * SIZE, None)
    assert machine.pool.get_num_free_blocks() == 2
    machine.balloon.set_limit(40 * SIZE, None)
    assert machine.pool.get_num_free_blocks() == 32
    assert machine.balloon.in_use_blocks == len(blocks)


def test_cached_blocks_go_least_recently_used_first(machine: Machine) -> None:
    old, young = machine.write(6), machine.write(6)
    machine.end(old, cached=True)
    machine.end(young, cached=True)
    machine.balloon.set_limit(8 * SIZE, None)
    assert machine.balloon.give_now() == 4 * SIZE
    assert [block.block_hash for block in old].count(None) == 4
    assert all(block.block_hash for block in young)


def test_idle_blocks_go_before_cached_ones_and_after_a_while_by_themselves(machine: Machine) -> None:
    idle, cached = machine.write(6), machine.write(6)
    machine.end(idle)
    machine.end(cached, cached=True)
    assert machine.balloon.settle() == 0, "they may soon be used again"
    machine.now_s = 1.0
    assert machine.balloon.settle() == 0
    machine.now_s = 2.5
    assert machine.balloon.settle() == 6 * SIZE
    assert all(block.block_hash for block in cached)
    assert machine.pool.get_num_free_blocks() == 40


def test_a_request_finds_free_blocks_while_idle_ones_are_given_back(machine: Machine) -> None:
    machine.write(10)
    machine.end(machine.write(30))
    machine.balloon.settle()
    machine.now_s = 2.5
    n_free = []
    release = machine.balloon._release

    def note(runs: list[Run]) -> int:
        n_free.append(machine.pool.get_num_free_blocks())
        return release(runs)

    machine.balloon._release = note
    while machine.balloon.settle():
        pass
    assert n_free[0] == 15 and min(n_free) == 15, "half of what is free"
    assert len(machine.held) == 10 and machine.pool.get_num_free_blocks() == 30


def test_empty_blocks_come_in_the_place_of_idle_ones(machine: Machine) -> None:
    machine.write(2)
    machine.balloon.set_limit(6 * SIZE, None)
    machine.end(machine.write(4))
    machine.balloon.settle()
    machine.now_s = 2.5
    release = machine.balloon._release

    def note(runs: list[Run]) -> int:
        assert machine.pool.get_num_free_blocks() == 4
        return release(runs)

    machine.balloon._release = note
    assert machine.balloon.settle() == 4 * SIZE
    assert machine.balloon.pool_blocks == 6


def test_an_idle_block_that_was_used_meanwhile_is_young_again(machine: Machine) -> None:
    machine.end(machine.write(1))
    machine.balloon.settle()
    machine.now_s = 1.5
    machine.end(machine.write(1))
    machine.now_s = 2.5
    assert machine.balloon.settle() == 0


def test_never_below_the_floor_and_never_above_the_most() -> None:
    machine = Machine(most_blocks=30)
    machine.balloon.settle()
    assert machine.pool.get_num_free_blocks() == 30
    machine.balloon.set_limit(0, None)
    assert machine.pool.get_num_free_blocks() == machine.balloon.allowed_blocks == 5
    machine.balloon.set_limit(1 << 40, None)
    assert machine.pool.get_num_free_blocks() == 30


def test_the_most_is_not_below_the_floor() -> None:
    machine = Machine(most_blocks=0)
    machine.balloon.settle()
    assert machine.pool.get_num_free_blocks() == machine.balloon.allowed_blocks == 5


def test_blocks_in_use_stay_and_are_told(machine: Machine) -> None:
    blocks = machine.write(20)
    machine.balloon.set_limit(10 * SIZE, None)
    assert machine.balloon.give_now() is None and machine.balloon.beyond_limit
    machine.end(blocks[10:], cached=True)
    assert machine.balloon.give_now() == 10 * SIZE and not machine.balloon.beyond_limit
    assert len(machine.held) == 10


def test_what_was_preempted_cannot_be_used_again_before_its_memory_went_back(machine: Machine) -> None:
    blocks = machine.write(20)
    machine.balloon.set_limit(10 * SIZE, None)
    machine.end(blocks[10:], cached=True)
    machine.balloon.shrink()
    assert machine.pool.get_num_free_blocks() == 0 and machine.balloon.in_use_blocks == 10
    machine.balloon.set_limit(40 * SIZE, None)
    assert machine.pool.get_num_free_blocks() == 20
    assert machine.balloon.settle() == 10 * SIZE
    assert machine.pool.get_num_free_blocks() == 30


def test_neighbours_that_are_out_go_along(machine: Machine) -> None:
    machine.balloon.set_limit(8 * SIZE, None)
    blocks = machine.write(8)  # 8 to 1; those after are out
    machine.end(blocks[:1], cached=True)
    machine.balloon.set_limit(7 * SIZE, None)
    machine.balloon.give_now()
    assert machine.released == [(8, 10)]


def test_a_worker_that_fails_leaves_all_blocks_to_the_engine(machine: Machine) -> None:
    machine.end(machine.write(10), cached=True)
    machine.fails = True
    machine.balloon.set_limit(5 * SIZE, None)
    assert machine.balloon.give_now() == 0
    assert machine.pool.get_num_free_blocks() == 40
    assert machine.balloon.failure == "a worker is gone"
    machine.balloon.set_limit(5 * SIZE, None)
    assert machine.pool.get_num_free_blocks() == 40
    status = machine.balloon.status()
    assert status.floor_bytes == status.capacity_bytes


def test_the_most_is_kept_to_where_nothing_can_be_given_back_from_the_start() -> None:
    machine = Machine(most_blocks=10)
    machine.fails = True
    machine.balloon.settle()
    assert machine.balloon.failure and machine.pool.get_num_free_blocks() == 10
    blocks = machine.pool.use(10)
    assert not machine.balloon.beyond_limit
    machine.balloon.shrink()
    machine.pool.free_blocks(blocks)
    assert machine.balloon.pool_blocks == 10


def test_what_was_preempted_before_it_was_written_cannot_be_found_while_it_is_out(machine: Machine) -> None:
    blocks = machine.pool.use(6)
    for block in blocks:
        block.block_hash = "a prefix that was not computed"
    machine.pool.free_blocks(blocks)
    machine.balloon.set_limit(5 * SIZE, None)
    assert machine.pool.get_num_free_blocks() == 5
    out = [block for block in machine.pool.blocks[1:] if block.ref_cnt]
    assert len(out) == 35 and not any(block.block_hash for block in out)


def test_one_request_has_its_blocks_beside_those_that_are_held(machine: Machine) -> None:
    held = machine.write(4)
    machine.balloon.keep(len(held))
    machine.balloon.set_limit(0, None)
    assert machine.pool.get_num_free_blocks() == 5 and not machine.balloon.beyond_limit
    assert machine.balloon.status().floor_bytes == 9 * SIZE
    machine.end(held)
    machine.balloon.keep(0)
    machine.balloon.set_limit(0, None)
    assert machine.balloon.allowed_blocks == machine.pool.get_num_free_blocks() == 5
    machine.balloon.keep(1000)
    assert machine.pool.get_num_free_blocks() == machine.balloon.n_blocks


def test_what_is_held_comes_on_top_of_the_most_and_a_reset_keeps_to_it_after_a_failure() -> None:
    machine = Machine(most_blocks=5)
    machine.balloon.settle()
    machine.write(4)
    machine.balloon.keep(4)
    assert machine.pool.get_num_free_blocks() == 5
    machine.fails = True
    machine.end(machine.write(5), cached=True)
    machine.balloon.keep(0)
    machine.balloon.set_limit(0, None)
    machine.balloon.settle()
    assert machine.balloon.failure
    with machine.balloon.whole():
        assert machine.pool.get_num_free_blocks() == 36
    assert machine.balloon.pool_blocks == 5


def test_a_governor_that_is_silent_leaves_all_blocks_to_the_engine(machine: Machine) -> None:
    assert not machine.balloon.is_heard
    machine.balloon.set_limit(5 * SIZE, None)
    machine.now_s = 9.0
    assert machine.balloon.is_heard
    machine.balloon.lift_if_silent()
    assert machine.pool.get_num_free_blocks() == 5
    machine.now_s = 10.0
    assert not machine.balloon.is_heard
    machine.balloon.lift_if_silent()
    assert machine.pool.get_num_free_blocks() == 40
    assert machine.balloon.problem == "the governor is silent"
    machine.balloon.set_limit(5 * SIZE, None)
    assert machine.pool.get_num_free_blocks() == 5, "it is heard again"
    assert machine.balloon.problem is None


def test_the_whole_pool_is_there_for_a_reset(machine: Machine) -> None:
    machine.balloon.set_limit(5 * SIZE, None)
    with machine.balloon.whole():
        assert machine.pool.get_num_free_blocks() == 40
    machine.balloon.settle()
    assert machine.pool.get_num_free_blocks() == 5


def test_the_thread_finds_memory_at_once_and_looks_for_idle_blocks_no_more_often_for_it() -> None:
    machine = Machine()
    machine.balloon.start()
    machine.balloon.set_limit(40 * SIZE, None)
    looks, take = [], machine.balloon._take
    machine.balloon._take = lambda: (looks.append(1), take())[1]  # type: ignore[method-assign]
    for n_blocks in range(1, 21):
        found = threading.Event()
        machine.balloon._provide = lambda runs, found=found: (machine.provide(runs), found.set())[0]
        machine.write(1)
        assert found.wait(10), "long before the next look"
        assert sum(end - first for runs in machine.provided for first, end in runs) == n_blocks
    machine.balloon.stop()
    assert len(looks) < 10


def test_the_thread_gives_back_what_is_beyond_the_limit_and_stop_puts_all_back() -> None:
    machine = Machine()
    machine.balloon.start()
    machine.end(machine.write(10), cached=True)
    gone = threading.Event()
    release = machine.balloon._release
    machine.balloon._release = lambda runs: (release(runs), gone.set())[0]
    machine.balloon.set_limit(5 * SIZE, None)
    assert gone.wait(10)
    machine.balloon.stop()
    machine.balloon.stop()
    assert machine.pool.get_num_free_blocks() == 40


def test_whatever_happens_no_block_is_lost_and_the_limit_is_kept() -> None:
    for seed in range(200):
        chance = random.Random(seed)
        machine = Machine(n_blocks=chance.randint(8, 60))
        running: list[list[FakeBlock]] = []
        for _ in range(80):
            machine.now_s += chance.random()
            action = chance.randrange(7)
            n_free = machine.pool.get_num_free_blocks()
            if action == 0 and n_free:
                running.append(machine.write(chance.randint(1, n_free)))
            elif action == 1 and running:
                machine.end(running.pop(chance.randrange(len(running))), cached=chance.random() < 0.6)
            elif action == 2:
                machine.balloon.set_limit(chance.randrange(machine.balloon.n_blocks + 1) * SIZE, None)
            elif action == 3:
                machine.balloon.give_now()
            elif action == 5:
                machine.balloon.shrink()
            elif action == 6:
                machine.balloon.keep(chance.choice([0, 0, 3]))
            else:
                machine.balloon.settle()
            balloon = machine.balloon
            in_use = sum(map(len, running))
            assert balloon.in_use_blocks == in_use
            assert balloon.pool_blocks == in_use + machine.pool.get_num_free_blocks()
            assert len(machine.held) * SIZE == balloon.status().used_bytes, "what holds memory is known"
            if action in (3, 4, 5):
                assert balloon.pool_blocks <= max(balloon.allowed_blocks, in_use)
        machine.balloon.stop()
        assert machine.pool.get_num_free_blocks() + sum(map(len, running)) == machine.balloon.n_blocks


def test_runs() -> None:
    assert runs_of([]) == []
    assert runs_of([1, 2, 3, 7, 9, 10]) == [(1, 4), (7, 8), (9, 11)]
