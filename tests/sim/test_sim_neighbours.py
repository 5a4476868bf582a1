"""Neighbours: what is drawn for each kind, and that a process takes just that."""

from __future__ import annotations

import pytest
import simpy

from kvpsi.hog import HogSettings
from kvpsi.hog.worker import REST_S
from kvpsi.sim.boards import MIB, TOUCH_BYTES_S, Board
from kvpsi.sim.memory import Memory
from kvpsi.sim.neighbours import GROWTH, KINDS, Neighbour, draw

BOARD = Board("1G", 1024 * MIB, scope="cgroup:board")
UNTIL_S = 60.0


@pytest.mark.parametrize("size_bytes", [1, MIB, 400 * MIB])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_is_bounded_in_order_and_the_same_for_a_seed(kind: str, size_bytes: int) -> None:
    drawn = draw(kind, size_bytes, UNTIL_S, 3)
    assert drawn == draw(kind, size_bytes, UNTIL_S, 3) != draw(kind, size_bytes, UNTIL_S, 4)
    times_s, sizes = zip(*drawn.trace, strict=True)
    assert list(times_s) == sorted(times_s) and times_s[0] == 0 and drawn.shape == "trace"
    assert all(0 <= size <= size_bytes == drawn.size_bytes for size in sizes)


@pytest.mark.parametrize("size_bytes", [16, 100_000, MIB, 3 * MIB, 33 * MIB, 700 * MIB])
@pytest.mark.parametrize("kind", KINDS)
def test_a_process_has_what_its_trace_says(kind: str, size_bytes: int) -> None:
    """To the last step, once it had time to take it; and a step is a small part."""
    settings = draw(kind, size_bytes, UNTIL_S, 5)
    late_s = size_bytes / TOUCH_BYTES_S + 2 * REST_S
    looked = most = 0
    for at_s, has in played(settings):
        most = max(most, has)
        if not any(at_s - late_s < point_s <= at_s for point_s, _ in settings.trace):
            looked += 1
            assert settings.target_bytes(at_s) - settings.step_bytes < has <= settings.target_bytes(at_s)
    assert looked > 100 and size_bytes >= most > size_bytes // 4 and settings.step_bytes <= size_bytes // 16


@pytest.mark.parametrize("size_bytes", [16, 100_000, 3 * MIB, 300 * MIB])
def test_one_that_grows_once_keeps_all(size_bytes: int) -> None:
    settings = draw(GROWTH, size_bytes, UNTIL_S, 5)
    sizes = [has for _, has in played(settings)]
    assert sizes == sorted(sizes) and sizes[0] == 0 and size_bytes - settings.step_bytes < sizes[-1] <= size_bytes


def played(settings: HogSettings) -> list[tuple[float, int]]:
    """(seconds, bytes that it has), ten times a second."""
    env = simpy.Environment()
    memory = Memory(env, BOARD)
    neighbour = Neighbour(env, memory, settings, "neighbour")
    neighbour.start()
    found = []
    for tick in range(1, int(UNTIL_S * 10)):
        env.run(until=tick / 10)
        found.append((tick / 10, neighbour.group.anon_bytes if neighbour.group is not None else 0))
    return found
