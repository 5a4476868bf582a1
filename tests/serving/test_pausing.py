"""An answer that is paused goes on as if nothing had been, to the last bit, from a file or after reading it again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvpsi.kv import CacheSettings
from kvpsi.kv.spill import SpillFolder
from kvpsi.serving.context import ServedContext
from kvpsi.serving.engine import Engine
from kvpsi.serving.request import Failed, Text
from kvpsi.serving.rungs import PausedAnswer
from kvpsi.serving.settings import EngineSettings
from serving.test_engine import STORY, Asked, ask, opened

pytestmark = pytest.mark.engine
LONG = STORY * 12


@pytest.fixture(scope="module")
def context(default_model: Path) -> Iterator[ServedContext]:
    with opened(default_model) as context:
        yield context


def engine_with(context: ServedContext, folder: Path | None, **options: Any) -> Engine:
    spill = SpillFolder(folder, most_bytes=1 << 30, fingerprint=b"test") if folder else None
    return Engine(context, EngineSettings(parallel=3, **options), spill=spill, free_bytes=lambda: 1 << 30)


def chances(asked: Asked, *, most: int = 1 << 30) -> list[tuple[int, float]]:
    """The tokens as they come, and how likely they were, to the last bit."""
    found: list[tuple[int, float]] = []
    while len(found) < most:
        event = asked.events.get(timeout=120)
        assert not isinstance(event, Failed), event
        if not isinstance(event, Text):
            break
        found += [(each.chance.token, each.chance.logprob) for each in event.tokens]
    return found


def begin(engine: Engine, prompt: str = LONG) -> Asked:
    return ask(engine, prompt, max_tokens=40, ignore_eos=True, top_logprobs=0)


def paused_in_the_middle(engine: Engine, n_pauses: int) -> list[tuple[int, float]]:
    asked = begin(engine)
    found: list[tuple[int, float]] = []
    for _ in range(n_pauses):
        found += chances(asked, most=6)
        engine.ask(lambda: engine._pause(engine.running[-1])).result()
    return found + chances(asked)


@pytest.mark.parametrize("where", ["in a file", "nowhere"])
def test_nothing_changes_by_a_pause(context: ServedContext, tmp_path: Path, where: str) -> None:
    engine = engine_with(context, tmp_path if where == "in a file" else None)
    try:
        expected = chances(begin(engine))
        engine.ask(engine.sessions.clear).result()
        engine.ask(engine.conversations.give_resting).result()
        assert paused_in_the_middle(engine, n_pauses=2) == expected and len(expected) == 40
        assert engine.counters.pauses == 2 and engine.counters.forgotten_tokens == 0
        if where == "in a file":
            assert engine.parking.written == engine.parking.read_again == 2
            assert engine.parking.n_bytes == 0, "the files are gone"
    finally:
        engine.close()
        context.cache.clear()


def test_who_holds_most_is_paused_before_anybody_forgets(default_model: Path, tmp_path: Path) -> None:
    settings = CacheSettings(keep=4, tail=32, turn=0)
    with opened(default_model, 2048, settings=settings) as context:
        engine = engine_with(context, tmp_path, stretch=0)
        try:
            first = begin(engine)
            before = chances(first, most=2)
            second = begin(engine, "Another story. " + LONG)
            chances(second, most=2)
            used = context.cache.used_cells
            engine.memory.set_limit((used * 3 // 4) * context.cache.bytes_per_cell, 64)
            assert len(before + chances(first)) == 40
            engine.memory.set_limit(engine.memory.status().capacity_bytes, None)
            assert len(chances(second)) >= 36
            given = engine.memory.given_bytes
            assert given["paused"] > 0 and given["forgotten"] == 0 and engine.counters.pauses > 0
            assert engine.parking.written > 0 and engine.counters.forgotten_tokens == 0
        finally:
            engine.close()


def test_a_disk_that_hangs_keeps_nobody_waiting(
    context: ServedContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with(context, tmp_path)
    write = SpillFolder.write

    def slow(folder: SpillFolder, state: bytes) -> object:
        time.sleep(2.5)
        return write(folder, state)

    try:
        expected = chances(begin(engine))
        engine.ask(engine.conversations.give_resting).result()
        monkeypatch.setattr(SpillFolder, "write", slow)
        asked = begin(engine)
        found = chances(asked, most=6)
        began = time.monotonic()
        engine.ask(lambda: engine._pause(engine.running[-1])).result()
        assert time.monotonic() - began < 2.4
        assert found + chances(asked) == expected, "it was read again"
    finally:
        engine.close()
        context.cache.clear()
    assert not list(tmp_path.rglob("*.state"))


def test_one_that_gives_nothing_is_not_the_only_one_to_be_paused() -> None:
    """It may hold nothing yet, or only what it shares with others; that is no reason to forget."""
    held = [500, 300, 0]
    running: list[Any] = [SimpleNamespace(n_done=n) for n in held]
    conversations: Any = SimpleNamespace(recompute_s=lambda n: n / 100)
    rung = PausedAnswer(running, lambda _: running.pop().n_done, conversations, lambda: 1)
    assert rung.offer() is not None and rung.give(10) == 300 and len(running) == 1
    assert rung.offer() is None and rung.give(10) == 0 and len(running) == 1


def test_what_was_asked_is_known_after_the_context_has_grown(default_model: Path) -> None:
    chat = "<|im_start|>user\n" + LONG + "What does the keeper do?<|im_end|>\n<|im_start|>assistant\n"
    with opened(default_model, 1024, 2048) as context:
        engine = Engine(context, EngineSettings(parallel=2), spare_bytes=lambda: 1 << 30)
        try:
            asked = begin(engine, chat)
            chances(asked, most=2)
            assert engine.ask(lambda: engine._grow(1500)).result() and context.cache.n_cells > 1024
            assert context.question_of(engine.running[0].seq_id) is not None
            assert chances(asked)
        finally:
            engine.close()
