"""Compiled models, no cache of prefixes, priorities: what vLLM does by itself, and what else users choose."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from asked import N_TOKENS, PROMPTS, STEERED, Stock, with_options
from kvpsi.bench.vllm.server import GOVERNED, Setting
from served import serving
from test_balloon_in_vllm import FLOOR, MIB, settled, until

pytestmark = pytest.mark.timeout(1800)
JUMPS = [FLOOR, 2 * FLOOR, 363]


def test_compiled_and_without_a_cache_of_prefixes_answers_are_the_same(setting: Setting, tmp_path: Path) -> None:
    prompts = PROMPTS[:8]
    compiled = replace(setting, options=("--no-enable-prefix-caching",))
    (tmp_path / "stock").mkdir()
    with serving(compiled, tmp_path / "stock") as served:
        stock_texts = served.answers(prompts, N_TOKENS)
    with serving(with_options(compiled, *STEERED), tmp_path, GOVERNED) as served:
        assert served.answers(prompts, N_TOKENS) == stock_texts
        until(lambda: served.status()["committed_bytes"] == 0)  # nothing can be asked for again
        with served.toggled(3, JUMPS):
            texts = served.answers(prompts, N_TOKENS)
        status = served.status()
        print(f"compiled: {status['pauses']} times preempted, {status['returned_bytes'] / MIB:.0f} MiB given back")
        assert texts == stock_texts and status["pauses"] > 0
        settled(served, FLOOR)


def test_answers_are_the_same_where_requests_have_priorities(setting: Setting, stock: Stock, tmp_path: Path) -> None:
    chance = random.Random(5)
    asked = [(prompt, chance.randrange(4)) for _ in range(3) for prompt in chance.sample(PROMPTS, 24)]
    by_priority = with_options(setting, *STEERED, "--scheduling-policy", "priority")
    with serving(by_priority, tmp_path, GOVERNED) as served:
        with served.toggled(3, JUMPS), ThreadPoolExecutor(8) as clients:
            texts = list(clients.map(lambda each: served.answer(each[0], N_TOKENS, priority=each[1]), asked))
        wrong = sum(text != stock.texts[prompt] for (prompt, _), text in zip(asked, texts, strict=True))
        print(f"by priority: {served.status()['pauses']} times preempted, {wrong} of {len(asked)} answers wrong")
        assert not wrong and served.status()["pauses"] > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
def test_what_was_not_computed_is_not_found_after_a_preemption(monkeypatch: pytest.MonkeyPatch) -> None:
    """By priority a request may be preempted in the very step that it was scheduled in: its blocks are cached, and not
    written. That is rare, so that the test above does not depend on it."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from kvpsi.engines.vllm.scheduler import ElasticScheduler

    evicted: list[set[int]] = []
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *_: None)
    scheduler = object.__new__(ElasticScheduler)
    scheduler.pauses, scheduler.block_size = 0, 128
    scheduler.kv_cache_manager = SimpleNamespace(
        get_block_ids=lambda _: ([3, 4, 5],), block_pool=SimpleNamespace(evict_blocks=evicted.append)
    )
    scheduler._preempt_request(SimpleNamespace(request_id="a", num_computed_tokens=200), 0.0)
    assert evicted == [{4, 5}] and scheduler.pauses == 1, "200 tokens fill one block, and a part of the next"
