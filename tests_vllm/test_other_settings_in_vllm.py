"""Compiled models, and no cache of prefixes: what vLLM does by itself, and what else users choose."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from asked import N_TOKENS, PROMPTS, STEERED, with_options
from kvpsi.bench.vllm.server import GOVERNED, Setting
from served import serving
from test_balloon_in_vllm import FLOOR, MIB, settled, until

pytestmark = pytest.mark.timeout(1800)


def test_compiled_and_without_a_cache_of_prefixes_answers_are_the_same(setting: Setting, tmp_path: Path) -> None:
    prompts = PROMPTS[:8]
    compiled = replace(setting, options=("--no-enable-prefix-caching",))
    (tmp_path / "stock").mkdir()
    with serving(compiled, tmp_path / "stock") as served:
        stock_texts = served.answers(prompts, N_TOKENS)
    with serving(with_options(compiled, *STEERED), tmp_path, GOVERNED) as served:
        assert served.answers(prompts, N_TOKENS) == stock_texts
        until(lambda: served.status()["committed_bytes"] == 0)  # nothing can be asked for again
        ended, chance = threading.Event(), random.Random(3)

        def toggle() -> None:
            while not ended.wait(chance.uniform(0.02, 0.3)):
                served.limit(chance.choice([FLOOR, 2 * FLOOR, 363]))

        toggling = threading.Thread(target=toggle)
        toggling.start()
        texts = served.answers(prompts, N_TOKENS)
        ended.set()
        toggling.join()
        status = served.status()
        print(f"compiled: {status['pauses']} times preempted, {status['returned_bytes'] / MIB:.0f} MiB given back")
        assert texts == stock_texts and status["pauses"] > 0
        settled(served, FLOOR)
