"""What was forgotten is read again while nobody waits, and then it is as if it had never been forgotten."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvpsi.kv import CacheSettings
from kvpsi.kv.spill import SpillFolder
from kvpsi.serving.context import ServedContext
from kvpsi.serving.engine import Engine
from kvpsi.serving.settings import EngineSettings
from serving.test_engine import STORY, ask, opened
from serving.test_pausing import chances

pytestmark = pytest.mark.engine
LONG = STORY * 24
SETTINGS = CacheSettings(keep=4, tail=64, turn=32)
ROOM_CELLS = 400


@pytest.fixture(scope="module")
def context(default_model: Path) -> Iterator[ServedContext]:
    with opened(default_model, 2048, settings=SETTINGS) as context:
        yield context


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def forgetful(engine: Engine) -> list[int]:
    """A conversation that was read and answered where there was no room for all of it; the next turn's prompt."""
    cache = engine.context.cache
    engine.memory.set_limit(ROOM_CELLS * cache.bytes_per_cell, 64)
    first = ask(engine, LONG, max_tokens=24, ignore_eos=True, top_logprobs=0)
    answered = [token for token, _ in chances(first)]
    assert engine.counters.forgotten_tokens > 50 and len(answered) == 24
    engine.memory.set_limit(engine.memory.status().capacity_bytes, None)
    asked = engine.context.model.tokenize(b" What did he write in his book that night?", False, True)
    return [*first.request.prompt, *answered, *asked]


def next_turn(engine: Engine, prompt: list[int]) -> list[tuple[int, float]]:
    return chances(ask(engine, prompt, max_tokens=16, ignore_eos=True, top_logprobs=0))


def never_forgotten(context: ServedContext, prompt: list[int]) -> list[tuple[int, float]]:
    context.cache.clear()
    engine = Engine(context, EngineSettings(parallel=2))
    try:
        found = next_turn(engine, prompt)
        assert engine.counters.cached_tokens == engine.counters.forgotten_tokens == 0
        return found
    finally:
        engine.close()
        context.cache.clear()


@pytest.mark.parametrize("when", ["idle", "before the next turn", "interrupted by the next turn"])
def test_the_next_turn_is_answered_as_if_nothing_had_been_forgotten(context: ServedContext, when: str) -> None:
    engine = Engine(context, EngineSettings(parallel=2, chunk_beside=64, heals=when != "before the next turn"))
    try:
        prompt = forgetful(engine)
        if when == "idle":
            wait_for(lambda: (resting := engine.conversations.resting) is not None and not resting.lost)
            assert engine.healing.tokens > 200 and engine.healing.seconds > 0
            cached = engine.counters.cached_tokens
        elif when == "interrupted by the next turn":
            wait_for(lambda: engine.healing.tokens > 0)
        found = next_turn(engine, prompt)
        if when == "idle":
            assert engine.counters.cached_tokens - cached >= len(prompt) - 64, "hardly anything is left to read"
        elif when == "before the next turn":
            assert engine.healing.tokens == 0
        assert context.cache.trusted
    finally:
        engine.close()
    assert found == never_forgotten(context, prompt)


def test_what_is_to_be_healed_is_not_parked_before(context: ServedContext, tmp_path: Path) -> None:
    """As soon as the limit begins to grow back: what it holds still is not worth a file, and the rest would be lost."""
    spill = SpillFolder(tmp_path, most_bytes=1 << 30, fingerprint=b"test")
    settings = EngineSettings(parallel=2, least_idle_s=0.0)
    engine = Engine(context, settings, spare_bytes=lambda: 1 << 30, free_bytes=lambda: 1 << 30, spill=spill)
    try:
        forgetful(engine)
        engine.memory.set_limit((context.cache.n_cells - 200) * context.cache.bytes_per_cell, None)
        wait_for(lambda: engine.healing.tokens > 200 and not engine.healing.may_come)
        wait_for(lambda: engine.parking.written == 1)
        (session,) = engine.sessions
        assert len(session.tokens) > 500, "then it is, all of it"
        engine.memory.set_limit(engine.memory.status().capacity_bytes, None)
    finally:
        engine.close()
        context.cache.clear()


def test_nothing_is_healed_while_there_is_no_room(context: ServedContext) -> None:
    engine = Engine(context, EngineSettings(parallel=2), is_tight=lambda: True)
    try:
        prompt = forgetful(engine)
        time.sleep(0.7)
        assert engine.healing.tokens == 0 and engine.conversations.resting is not None
        found = next_turn(engine, prompt)
    finally:
        engine.close()
    assert found == never_forgotten(context, prompt)
