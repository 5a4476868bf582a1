"""What else takes memory on a board: how much at which time, drawn from a seed, and the process that takes it.

Each kind is a trace of (seconds, bytes) in `HogSettings`, so that `kvpsi hog --trace` can play the same for real; those
of `attackers` are many processes. A new kind is a function in `KINDS` that returns points, never a shape of
`HogSettings`: the boards of a fleet play points only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping

import simpy

from kvpsi.errors import UsageError
from kvpsi.hog import HogSettings, step_bytes_for
from kvpsi.hog.worker import REST_S, TOUCH_EVERY_S
from kvpsi.sim.attackers import ATTACKS
from kvpsi.sim.boards import MIB, TOUCH_BYTES_S
from kvpsi.sim.memory import Events, Group, Memory, until_killed
from kvpsi.sim.planning import draw_rate

Points = tuple[tuple[float, int], ...]

_STALL_S = 0.005
_STEPS = 16


def _camera(rng: random.Random, size_bytes: int, until_s: float) -> Points:
    """Switched on and off, all of its buffers at once."""
    points, at_s, on = [(0.0, 0)], rng.uniform(1, 6), True
    while at_s < until_s:
        points.append((at_s, size_bytes if on else 0))
        at_s += rng.uniform(8, 25) if on else rng.uniform(4, 15)
        on = not on
    return tuple(points)


def _bursts(rng: random.Random, size_bytes: int, until_s: float) -> Points:
    """Sensors: short peaks at random times."""
    points, at_s = [(0.0, 0)], rng.expovariate(1 / 4)
    while at_s < until_s:
        lasts_s = rng.uniform(0.3, 2.0)
        points += [(at_s, int(size_bytes * rng.uniform(0.3, 1.0))), (at_s + lasts_s, 0)]
        at_s += lasts_s + rng.expovariate(1 / 4)
    return tuple(points)


def _browser(rng: random.Random, size_bytes: int, until_s: float) -> Points:
    """A little more with every page, and now and then many are closed."""
    points, at_s, now_bytes = [(0.0, 0)], 0.5, 0
    while at_s < until_s:
        if rng.random() < 0.08:
            now_bytes = int(now_bytes * rng.uniform(0.2, 0.6))
        else:
            now_bytes = min(size_bytes, now_bytes + int(size_bytes * rng.uniform(0.02, 0.15)))
        points.append((at_s, now_bytes))
        at_s += rng.expovariate(1 / 1.5)
    return tuple(points)


def _model(rng: random.Random, size_bytes: int, until_s: float) -> Points:
    """A second model: it loads its weights, keeps them for some questions, and is unloaded again."""
    points, at_s = [(0.0, 0)], rng.uniform(2, 10)
    while at_s < until_s:
        load_s = rng.uniform(2, 5)
        points += [(at_s + load_s * n / 20, size_bytes * n // 20) for n in range(1, 21)]
        at_s += load_s + rng.uniform(15, 40)
        points.append((at_s, 0))
        at_s += rng.uniform(5, 30)
    return tuple(points)


KINDS: Mapping[str, Callable[[random.Random, int, float], Points]] = {
    "camera": _camera,
    "bursts": _bursts,
    "browser": _browser,
    "model": _model,
}
GROWTH = "growth"
ALL = (*KINDS, GROWTH, *ATTACKS)
"""Names of all neighbours."""


def _step_bytes(size_bytes: int) -> int:
    """Small enough that a process has what its trace says but for a 16th of its size."""
    return step_bytes_for(size_bytes, size_bytes // _STEPS)


def _growth(rng: random.Random, size_bytes: int, until_s: float) -> HogSettings:
    """It grows once, at a rate as `kvpsi.sim.planning` takes it, and keeps all."""
    at_s = until_s * rng.uniform(0.3, 0.6)
    step_bytes = min(1 * MIB, _step_bytes(size_bytes))
    return HogSettings(size_bytes, step_bytes, warmup_s=at_s, rate_bytes_s=draw_rate(rng), hold_s=until_s)


def draw(kind: str, size_bytes: int, until_s: float, seed: int) -> HogSettings:
    """A neighbour that has so much at most; the same one for a seed.

    Raises:
        UsageError: there is none of this kind.
    """
    rng = random.Random(f"{kind} {seed}")
    if kind == GROWTH:
        return _growth(rng, size_bytes, until_s)
    if kind not in KINDS:
        raise UsageError(f"Neighbours are {', '.join(ALL)}, not {kind!r}.")
    points = KINDS[kind](rng, size_bytes, until_s)
    return HogSettings(size_bytes, _step_bytes(size_bytes), shape="trace", trace=points, hold_s=until_s)


def processes(kind: str, size_bytes: int, until_s: float, seed: int) -> tuple[HogSettings, ...]:
    """The processes of a neighbour or an attacker, which have so much together at most; the same ones for a seed.

    Raises:
        UsageError: there is none of this kind.
    """
    if kind in ATTACKS:
        return ATTACKS[kind](random.Random(f"{kind} {seed}"), size_bytes).processes(until_s)
    return (draw(kind, size_bytes, until_s, seed),)


def all_of(kinds: Iterable[tuple[str, int]], until_s: float, seed: int) -> list[tuple[str, HogSettings]]:
    """The processes of all neighbours of a board, by name; the same ones for a seed.

    Args:
        kinds: with the most that each takes, in bytes.
        until_s: seconds for which they are drawn.
        seed: of the board.

    Raises:
        UsageError: there is none of a kind.
    """
    return [
        (f"{kind} {number}", process)
        for number, (kind, size_bytes) in enumerate(kinds, start=1)
        for process in processes(kind, size_bytes, until_s, 1000 * seed + number)
    ]


def draw_stall(share: float, until_s: float, seed: int) -> list[tuple[float, float]]:
    """Stall that has nothing to do with the board's memory, such as of a container at a limit of its own: (seconds, how
    long), 5 ms on average, and in all such a share of the time.

    Raises:
        UsageError: the share is not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise UsageError(f"A share of {share:g} of the time cannot be stalled; give 0 or more, and less than 1.")
    rng, found, at_s = random.Random(f"stall {seed}"), [], 0.0
    while share and at_s < until_s:
        at_s += rng.expovariate(share / (1 - share) / _STALL_S)
        lasts_s = rng.expovariate(1 / _STALL_S)
        found.append((at_s, lasts_s))
        at_s += lasts_s
    return found


class Neighbour:
    """A process that begins after its warm-up: it takes what its settings say in steps, each no faster than memory can
    be written, and touches all of it five times a second.

    Attributes:
        group: its memory; None before it begins.
    """

    def __init__(self, env: simpy.Environment, memory: Memory, settings: HogSettings, name: str) -> None:
        self.group: Group | None = None
        self._env, self._memory, self._settings, self._name = env, memory, settings, name

    def start(self) -> None:
        """Begin."""
        self._env.process(until_killed(self._run()))

    @property
    def stall_s(self) -> float:
        """Seconds in which it waited for memory."""
        return self.group.stall.total_s if self.group is not None else 0.0

    def _run(self) -> Events:
        s, env, memory = self._settings, self._env, self._memory
        began_s, touched_s, has_bytes = env.now, 0.0, 0
        yield env.timeout(s.warmup_s)
        group = self.group = memory.group(self._name)
        group.process = env.active_process
        while (now_s := env.now - began_s) < s.duration_s:
            target_bytes = s.target_bytes(now_s)
            if has_bytes + s.step_bytes <= target_bytes:
                yield from memory.take(group, s.step_bytes)
                has_bytes += s.step_bytes
                yield env.timeout(s.step_bytes / TOUCH_BYTES_S)
            elif has_bytes > target_bytes:
                memory.give(group, s.step_bytes)
                has_bytes -= s.step_bytes
            else:
                if now_s - touched_s >= TOUCH_EVERY_S:
                    touched_s = now_s
                    yield from memory.touch(group)
                yield env.timeout(min(REST_S, max(1e-6, s.duration_s - now_s)))
        memory.end(group)
