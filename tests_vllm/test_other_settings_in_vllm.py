"""Compiled models, no cache of prefixes, priorities: what vLLM does by itself, and what else users choose."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from asked import N_TOKENS, PROMPTS, STEERED, Stock, with_options
from kvpsi.bench.vllm.server import GOVERNED, Setting
from served import Served, serving
from test_balloon_in_vllm import FLOOR, MIB, settled, until

pytestmark = pytest.mark.timeout(1800)


@contextlib.contextmanager
def toggled(served: Served) -> Iterator[None]:
    """The limit jumps meanwhile."""
    ended, chance = threading.Event(), random.Random(3)

    def toggle() -> None:
        while not ended.wait(chance.uniform(0.02, 0.3)):
            served.limit(chance.choice([FLOOR, 2 * FLOOR, 363]))

    toggling = threading.Thread(target=toggle)
    toggling.start()
    try:
        yield
    finally:
        ended.set()
        toggling.join()


def test_compiled_and_without_a_cache_of_prefixes_answers_are_the_same(setting: Setting, tmp_path: Path) -> None:
    prompts = PROMPTS[:8]
    compiled = replace(setting, options=("--no-enable-prefix-caching",))
    (tmp_path / "stock").mkdir()
    with serving(compiled, tmp_path / "stock") as served:
        stock_texts = served.answers(prompts, N_TOKENS)
    with serving(with_options(compiled, *STEERED), tmp_path, GOVERNED) as served:
        assert served.answers(prompts, N_TOKENS) == stock_texts
        until(lambda: served.status()["committed_bytes"] == 0)  # nothing can be asked for again
        with toggled(served):
            texts = served.answers(prompts, N_TOKENS)
        status = served.status()
        print(f"compiled: {status['pauses']} times preempted, {status['returned_bytes'] / MIB:.0f} MiB given back")
        assert texts == stock_texts and status["pauses"] > 0
        settled(served, FLOOR)


def test_answers_are_the_same_where_requests_have_priorities(setting: Setting, stock: Stock, tmp_path: Path) -> None:
    """A request may be preempted in the very step that it was scheduled in: its blocks are cached, and not written."""
    chance = random.Random(5)
    asked = [(prompt, chance.randrange(4)) for _ in range(3) for prompt in chance.sample(PROMPTS, 24)]
    by_priority = with_options(setting, *STEERED, "--scheduling-policy", "priority")
    with serving(by_priority, tmp_path, GOVERNED) as served:
        with toggled(served), ThreadPoolExecutor(8) as clients:
            texts = list(clients.map(lambda each: served.answer(each[0], N_TOKENS, priority=each[1]), asked))
        wrong = sum(text != stock.texts[prompt] for (prompt, _), text in zip(asked, texts, strict=True))
        print(f"by priority: {served.status()['pauses']} times preempted, {wrong} of {len(asked)} answers wrong")
        assert not wrong and served.status()["pauses"] > 0
