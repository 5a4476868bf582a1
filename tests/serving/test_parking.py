"""Idle conversations in files: what comes back goes on in the same words, and what is lost there is read again."""

from __future__ import annotations

import contextlib
import logging
import mmap
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvpsi.kv.spill import Spilled, SpillFolder
from kvpsi.serving.context import ServedContext
from kvpsi.serving.engine import Engine
from kvpsi.serving.settings import EngineSettings
from kvpsi.serving.step import EVEN_PIECE_TOKENS
from serving.test_engine import STORY, ask, opened

pytestmark = pytest.mark.engine
MIB = 1 << 20
LONG = STORY * 24


@pytest.fixture(scope="module")
def context(default_model: Path) -> Iterator[ServedContext]:
    with opened(default_model) as context:
        yield context


@contextlib.contextmanager
def parking(context: ServedContext, folder: Path, most_bytes: int = 1 << 30) -> Iterator[Engine]:
    """An engine that thinks that memory may soon be too little, though there is room enough for one conversation."""
    spill = SpillFolder(folder, most_bytes=most_bytes, fingerprint=b"test")
    settings = EngineSettings(parallel=4, least_idle_s=0.0)
    engine = Engine(context, settings, spare_bytes=lambda: 1 << 30, spill=spill, is_tight=lambda: True)
    try:
        yield engine
    finally:
        engine.close()
        context.cache.set_limit(context.cache.capacity_bytes, None)
        context.cache.clear()
        assert not list(folder.rglob("parked-*"))


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def park(engine: Engine) -> tuple[list[int], str]:
    """A conversation that is in a file only; its prompt, and the answer."""
    first = ask(engine, LONG, max_tokens=12)
    text, _ = first.finished()
    wait_for(lambda: engine.parking.written == 1)
    cache = engine.context.cache
    cache.set_limit(0, None)
    assert (engine.memory.give_now() or 0) > 0
    cache.set_limit(cache.capacity_bytes, None)
    assert engine.sessions.n_parked == 1 and engine.sessions.n_bytes == 0
    return list(first.request.prompt), text


def test_what_was_parked_goes_on_in_the_same_words(context: ServedContext, tmp_path: Path) -> None:
    with parking(context, tmp_path) as engine:
        prompt, text = park(engine)
        given = engine.memory.ladder.given_bytes
        assert given["parked"] >= len(prompt) * context.cache.bytes_per_cell and given["dropped"] == 0
        again, end = ask(engine, prompt, max_tokens=12).finished()
        assert again == text and end.cached_tokens == len(prompt) - EVEN_PIECE_TOKENS
        assert engine.parking.read_again == 1 and engine.parking.failures == 0
        wait_for(lambda: engine.parking.written == 2)  # it rests, and is parked again
        assert engine.parking.n_bytes < 1.2 * (len(prompt) + 12) * context.cache.bytes_per_cell, "the old file is gone"
        assert context.cache.trusted


def test_keys_and_values_are_the_same_to_the_last_bit(context: ServedContext, tmp_path: Path) -> None:
    with parking(context, tmp_path) as engine:
        prompt = list(ask(engine, LONG, max_tokens=2).request.prompt)
        wait_for(lambda: engine.parking.written == 1)
        (session,) = engine.sessions
        assert session.state is not None
        before = bytes(session.state)
        engine.ask(lambda: engine.sessions.unload(session)).result()
        engine.ask(lambda: engine.parking.read(session)).result()
        wait_for(lambda: session.state is not None)
        assert bytes(session.state) == before
        assert len(before) > len(prompt) * context.cache.bytes_per_cell


@pytest.mark.parametrize("harm", ["damaged", "cut short", "gone"])
def test_a_file_that_is_not_as_it_was_means_reading_again(
    context: ServedContext, tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    with parking(context, tmp_path) as engine, caplog.at_level(logging.WARNING, "kvpsi"):
        prompt, text = park(engine)
        (path,) = tmp_path.rglob("*.state")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        if harm == "gone":
            path.unlink()
        else:
            path.write_bytes(content if harm == "damaged" else content[:-100])
        again, end = ask(engine, prompt, max_tokens=12).finished()
        assert again == text and end.cached_tokens == 0
        assert engine.parking.failures == 1 and "lost" in caplog.text
        assert ask(engine, STORY, max_tokens=4).finished()[0]


def test_a_disk_that_is_full_costs_nothing_but_time(
    context: ServedContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with parking(context, tmp_path) as engine, caplog.at_level(logging.WARNING, "kvpsi"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))  # the kernel refuses to write on
        try:
            first = ask(engine, LONG, max_tokens=12)
            text, _ = first.finished()
            wait_for(lambda: engine.parking.failures == 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "could not be written" in caplog.text and not list(tmp_path.rglob("*.state"))
        engine.context.cache.set_limit(0, None)
        engine.memory.give_now()
        engine.context.cache.set_limit(context.cache.capacity_bytes, None)
        assert len(engine.sessions) == 0 and engine.memory.ladder.given_bytes["dropped"] > 0
        assert ask(engine, list(first.request.prompt), max_tokens=12).finished()[0] == text
        assert engine.parking.written == 0


def test_the_oldest_file_makes_room_for_the_next(context: ServedContext, tmp_path: Path) -> None:
    most_bytes = int(1.5 * 560 * context.cache.bytes_per_cell)
    with parking(context, tmp_path, most_bytes) as engine:
        for number, word in enumerate(("Seven", "Blue", "Iron"), start=1):
            ask(engine, f"{word}. {LONG}", max_tokens=2).finished()
            wait_for(lambda number=number: engine.parking.written == number)  # type: ignore[misc]
        wait_for(lambda: len(list(tmp_path.rglob("*.state"))) == 1)
        assert engine.parking.failures == 0 and 0 < engine.parking.n_bytes <= most_bytes


def test_who_is_given_up_while_it_is_written_leaves_no_file(
    context: ServedContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, begun = SpillFolder.write, threading.Event()

    def write_slowly(folder: SpillFolder, state: mmap.mmap) -> Spilled:
        begun.set()
        time.sleep(0.3)
        return write(folder, state)

    monkeypatch.setattr(SpillFolder, "write", write_slowly)
    with parking(context, tmp_path) as engine:
        ask(engine, LONG, max_tokens=2).finished()
        assert begun.wait(30)
        engine.ask(engine.sessions.clear).result()
        wait_for(lambda: engine.parking.written == 1)
        wait_for(lambda: not list(tmp_path.rglob("*.state")) and engine.parking.n_bytes == 0)


def test_nothing_is_parked_while_there_is_memory_enough(context: ServedContext, tmp_path: Path) -> None:
    spill = SpillFolder(tmp_path, most_bytes=1 << 30, fingerprint=b"test")
    engine = Engine(context, EngineSettings(parallel=4, least_idle_s=0.0), spill=spill)
    try:
        for word in ("Seven", "Blue"):
            ask(engine, f"{word} {STORY}", max_tokens=2).finished()
        time.sleep(0.6)  # it looks four times a second
        assert len(engine.sessions) == 1 and engine.parking.written == 0
        assert not list(tmp_path.rglob("*.state"))
    finally:
        engine.close()
        context.cache.clear()


def test_reading_from_a_slow_disk_is_not_worth_it(context: ServedContext, tmp_path: Path) -> None:
    with parking(context, tmp_path) as engine:
        assert engine.parking.is_worth_it(1 << 20, recompute_s=1.0)
        assert not engine.parking.is_worth_it(1 << 30, recompute_s=1.0)


def test_what_rests_is_not_lost_by_the_attempt_to_park_it(context: ServedContext, tmp_path: Path) -> None:
    """It is more than half of what the gate allows, so that there is no room for a copy of it."""
    with parking(context, tmp_path) as engine:
        engine.settings = EngineSettings(parallel=4, least_idle_s=60.0)
        first = ask(engine, LONG, max_tokens=2)
        first.finished()
        n_held = len(first.request.prompt) + 1
        context.cache.set_limit(int(1.5 * n_held) * context.cache.bytes_per_cell, None)
        time.sleep(1.0)
        assert len(engine.sessions) == 0 and engine.conversations.resting_tokens == n_held
        end = ask(engine, list(first.request.prompt), max_tokens=2).finished()[1]
        assert end.cached_tokens == n_held - 1 - EVEN_PIECE_TOKENS


def test_it_is_read_from_its_file_although_something_rests_and_memory_is_short(
    context: ServedContext, tmp_path: Path
) -> None:
    with parking(context, tmp_path) as engine:
        prompt, text = park(engine)
        engine.settings = EngineSettings(parallel=4, least_idle_s=60.0)
        other = ask(engine, "Something else entirely. " * 10, max_tokens=2)
        other.finished()
        n_other = engine.conversations.resting_tokens
        context.cache.set_limit((2 * (len(prompt) + 20) + n_other) * context.cache.bytes_per_cell, None)
        again, end = ask(engine, prompt, max_tokens=12).finished()
        assert again == text and end.cached_tokens == len(prompt) - EVEN_PIECE_TOKENS


def test_a_slow_disk_is_waited_for_and_one_that_hangs_is_not(
    context: ServedContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, hangs = SpillFolder.read, threading.Event()

    def read_slowly(folder: SpillFolder, spilled: Spilled) -> mmap.mmap:
        time.sleep(0.4)
        return read(folder, spilled)

    def read_never(folder: SpillFolder, spilled: Spilled) -> mmap.mmap:
        hangs.wait(60)
        return read(folder, spilled)

    with parking(context, tmp_path) as engine:
        prompt, text = park(engine)
        monkeypatch.setattr(SpillFolder, "read", read_slowly)
        again, end = ask(engine, prompt, max_tokens=12).finished()
        assert again == text and end.cached_tokens == len(prompt) - EVEN_PIECE_TOKENS
        wait_for(lambda: engine.parking.written == 2)
        engine.ask(lambda: engine.sessions.unload(next(iter(engine.sessions)))).result()
        monkeypatch.setattr(SpillFolder, "read", read_never)
        again, end = ask(engine, prompt, max_tokens=12).finished()
        assert again == text and end.cached_tokens == 0
        hangs.set()
