"""The simulated kernel: what it hands out, takes back, and whom it kills."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpsi.sim.boards import MIB, Board, Swap
from kvpsi.sim.memory import ACTIVATED_SHARE, MISSES, SPARE_SHARE, Events, File, Group, Memory, until_killed

SPARE = int(SPARE_SHARE * 100 * MIB)
"""What a board of 100 MiB with swap keeps free."""


def board(mib: int = 100, swap_mib: int = 0, ram_share: float = 0.0) -> Board:
    swap = Swap(swap_mib * MIB, 100 * MIB, 200 * MIB, ram_share, 400 * MIB) if swap_mib else None
    return Board("small", mib * MIB, swap=swap, read_bytes_s=50 * MIB)


class World:
    def __init__(self, what: Board) -> None:
        self.env = simpy.Environment()
        self.memory = Memory(self.env, what)

    def run(self, group: Group, *work: Callable[[], Events]) -> None:
        """Have a process do this, until it is done or killed."""

        def process() -> Events:
            for each in work:
                yield from each()

        group.process = self.env.process(until_killed(process()))
        self.env.run()


def test_without_swap_whoever_has_most_is_killed() -> None:
    world = World(board(100))
    large, small = world.memory.group("large"), world.memory.group("small")
    world.run(large, lambda: world.memory.take(large, 70 * MIB))
    world.run(small, lambda: world.memory.take(small, 40 * MIB))
    assert world.memory.killed == ["large"] and not large.alive and small.alive
    assert small.anon_bytes == 40 * MIB and world.memory.usage_bytes == 40 * MIB


def test_who_takes_too_much_is_killed_itself() -> None:
    world = World(board(100))
    greedy, modest = world.memory.group("greedy"), world.memory.group("modest")
    world.run(modest, lambda: world.memory.take(modest, 30 * MIB))
    world.run(greedy, lambda: world.memory.take(greedy, 90 * MIB))
    assert world.memory.killed == ["greedy"] and modest.anon_bytes == 30 * MIB
    assert world.memory.stall.total_s == 0, "as on a real board without swap, nobody waited before"


def test_weights_go_before_anybody_dies_and_are_waited_for() -> None:
    world = World(board(100))
    model, hog = world.memory.group("model"), world.memory.group("hog")
    weights = File("weights", 40 * MIB)
    world.memory.map(model, weights)
    world.run(model, lambda: world.memory.read(model, weights))
    assert weights.resident_bytes == 40 * MIB and world.env.now == pytest.approx(0.8)
    assert model.stall.total_s == 0, "what is read for the first time is no stall"
    world.run(hog, lambda: world.memory.take(hog, 70 * MIB))
    assert not world.memory.killed and weights.resident_bytes == pytest.approx(30 * MIB, abs=2)
    world.run(model, lambda: world.memory.read(model, weights))
    assert model.stall.total_s == pytest.approx(MISSES * 10 / 50, rel=0.01), "for what lacks"
    assert weights.resident_bytes == pytest.approx(30 * MIB, abs=2), "there is still no room for the rest"


def test_page_cache_that_nobody_uses_goes_first_and_for_nothing() -> None:
    world = World(board(100))
    hog = world.memory.group("hog")
    world.memory.idle_file_bytes = 80 * MIB
    world.run(hog, lambda: world.memory.take(hog, 60 * MIB))
    assert world.memory.idle_file_bytes == pytest.approx(40 * MIB, abs=2) and world.memory.stall.total_s < 0.02


def test_what_is_not_touched_goes_to_swap_before_what_is() -> None:
    world = World(board(100, swap_mib=100))
    model, hog = world.memory.group("model"), world.memory.group("hog")
    world.run(model, lambda: world.memory.take(model, 70 * MIB))
    world.memory.cool_down(model, 50 * MIB)
    world.run(hog, lambda: world.memory.take(hog, 60 * MIB))
    out = 30 * MIB + SPARE
    assert (model.cold_out_bytes, model.warm_out_bytes) == (pytest.approx(out, abs=32), 0)
    assert hog.stall.total_s == pytest.approx(out / (100 * MIB), rel=0.01), "at 100 MiB/s"
    world.run(model, lambda: world.memory.warm_up(model, 25 * MIB))
    assert model.warm_out_bytes == pytest.approx(out / 2, abs=32), "half of it, as much as of all"


def test_compressed_swap_takes_memory_itself() -> None:
    world = World(board(100, swap_mib=100, ram_share=0.5))
    group = world.memory.group("one")
    world.run(group, lambda: world.memory.take(group, 120 * MIB))
    assert group.swapped_bytes == pytest.approx(40 * MIB + 2 * SPARE, abs=64)
    assert world.memory.usage_bytes == pytest.approx(100 * MIB - SPARE, abs=64)
    world.run(group, lambda: world.memory.take(group, 20 * MIB))
    assert world.memory.killed == [] and group.swapped_bytes <= 100 * MIB
    world.run(group, lambda: world.memory.take(group, 60 * MIB))
    assert world.memory.killed == ["one"]


def test_zeros_take_nothing_in_compressed_swap() -> None:
    world = World(board(100, swap_mib=100, ram_share=0.5))
    model, hog = world.memory.group("model"), world.memory.group("hog")
    world.run(model, lambda: world.memory.take(model, 80 * MIB, zero=True))
    world.run(hog, lambda: world.memory.take(hog, 60 * MIB))
    assert model.zero_out_bytes == pytest.approx(40 * MIB + SPARE, abs=64)
    assert hog.stall.total_s == pytest.approx(model.zero_out_bytes / (400 * MIB), rel=0.01)
    assert world.memory.usage_bytes == pytest.approx(100 * MIB - SPARE, abs=64)
    world.run(model, lambda: world.memory.warm_up(model, 80 * MIB))
    assert model.zero_bytes == model.zero_out_bytes == 0 and hog.warm_out_bytes > 0, "now they do"


def test_what_was_read_once_goes_before_what_is_in_use() -> None:
    world = World(board(100, swap_mib=100))
    model, hog = world.memory.group("model"), world.memory.group("hog")
    weights = File("weights", 40 * MIB)
    world.memory.map(model, weights)
    world.run(model, lambda: world.memory.read(model, weights), lambda: world.memory.take(model, 50 * MIB))
    assert weights.dropped_bytes == 0
    world.run(hog, lambda: world.memory.take(hog, 20 * MIB))
    assert weights.dropped_bytes == pytest.approx(10 * MIB + SPARE, abs=64) and model.warm_out_bytes == 0
    dropped_bytes = weights.dropped_bytes
    world.run(model, lambda: world.memory.read(model, weights))
    assert 0 < weights.active_bytes <= ACTIVATED_SHARE * dropped_bytes
    assert world.memory.refaulted_bytes >= dropped_bytes


def test_files_and_processes_in_use_go_at_140_to_60_of_their_sizes() -> None:
    world = World(board(100, swap_mib=100))
    model, hog = world.memory.group("model"), world.memory.group("hog")
    weights = File("weights", 40 * MIB)
    world.memory.map(model, weights)
    world.run(model, lambda: world.memory.read(model, weights), lambda: world.memory.take(model, 56 * MIB))
    weights.active_bytes = weights.resident_bytes  # as if all of it had been dropped and read again
    world.run(hog, lambda: world.memory.take(hog, 10 * MIB))
    out = 6 * MIB + SPARE
    of_files = 0.7 * 40 / (0.7 * 40 + 0.3 * 56)
    assert weights.dropped_bytes == pytest.approx(of_files * out, rel=0.1)
    assert model.warm_out_bytes + hog.warm_out_bytes == pytest.approx((1 - of_files) * out, rel=0.1)


def test_more_than_there_is_comes_and_goes_without_an_end() -> None:
    world = World(board(100, swap_mib=40))
    group = world.memory.group("one")
    world.run(group, lambda: world.memory.take(group, 120 * MIB), lambda: world.memory.touch(group))
    assert group.warm_out_bytes == pytest.approx(20 * MIB + SPARE, abs=64) and group.alive


def test_what_is_touched_comes_back_from_swap() -> None:
    world = World(board(100, swap_mib=100))
    first, second = world.memory.group("first"), world.memory.group("second")
    world.run(first, lambda: world.memory.take(first, 80 * MIB))
    world.run(second, lambda: world.memory.take(second, 60 * MIB))
    assert first.warm_out_bytes + second.warm_out_bytes == pytest.approx(40 * MIB + SPARE, abs=64)
    world.memory.end(second)
    world.run(first, lambda: world.memory.touch(first))
    assert first.warm_bytes == 80 * MIB and first.warm_out_bytes == 0


OPERATIONS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["take", "zero", "give", "warm", "cool", "touch", "read", "end"]),
        st.integers(0, 60 * MIB),
    ),
    max_size=25,
)


@settings(deadline=None)
@given(OPERATIONS, st.sampled_from([0, 40]), st.sampled_from([0.0, 0.5]))
def test_nothing_is_ever_lost_or_taken_twice(
    operations: list[tuple[int, str, int]], swap_mib: int, ram_share: float
) -> None:
    world = World(board(100, swap_mib, ram_share))
    memory = world.memory
    groups = [memory.group(str(number)) for number in range(3)]
    weights = File("weights", 20 * MIB)
    memory.map(groups[0], weights)
    has = [0, 0, 0]
    for number, what, n_bytes in operations:
        group = groups[number]
        if not group.alive:
            continue
        before = group.warm_bytes + group.warm_out_bytes
        if what in ("take", "zero"):
            world.run(group, lambda g=group, n=n_bytes, w=what: memory.take(g, n, zero=w == "zero"))  # type: ignore[misc]
            has[number] += n_bytes
        elif what == "give":
            memory.give(group, n_bytes)
            has[number] -= min(n_bytes, before)
        elif what == "warm":
            world.run(group, lambda g=group, n=n_bytes: memory.warm_up(g, n))  # type: ignore[misc]
        elif what == "cool":
            memory.cool_down(group, n_bytes)
        elif what == "touch":
            world.run(group, lambda g=group: memory.touch(g))  # type: ignore[misc]
        elif what == "read" and number == 0:
            world.run(group, lambda g=group: memory.read(g, weights))  # type: ignore[misc]
        elif what == "end":
            memory.end(group)
        assert 0 <= memory.usage_bytes <= memory.board.memory_bytes
        assert 0 <= memory.swapped_bytes <= swap_mib * MIB and 0 <= weights.resident_bytes <= weights.size_bytes
        for each, expected in zip(groups, has, strict=True):
            parts = [getattr(each, f"{kind}{out}_bytes") for kind in ("warm", "cold", "zero") for out in ("", "_out")]
            assert min(parts) >= 0 and sum(parts) == (expected if each.alive else 0)
