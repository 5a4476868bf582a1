"""Blocks come and go in a running vLLM: the answers are stock vLLM's to the last letter, and memory goes back."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable

import pytest

from asked import N_TOKENS, PROMPTS, Stock
from served import Served

pytestmark = pytest.mark.timeout(1800)
FLOOR = 512 // 128 + 1
MIB = 1 << 20


def until(what: Callable[[], bool], seconds: float = 20) -> None:
    deadline_s = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def settled(served: Served, n_blocks: int) -> None:
    served.limit(n_blocks)
    until(lambda: served.status()["pool_blocks"] == n_blocks)


def same(served: Served, stock: Stock, prompts: list[str]) -> None:
    for prompt, text in zip(prompts, served.answers(prompts, N_TOKENS), strict=True):
        assert text == stock.texts[prompt]


def test_idle_memory_is_less_than_stock_by_nearly_all_of_the_cache(stock: Stock, steered: Served) -> None:
    less_bytes = stock.idle_rss_bytes - steered.rss_bytes()
    capacity_bytes = steered.status()["capacity_bytes"]
    print(f"idle: {less_bytes / MIB:.0f} MiB less than stock, the cache has {capacity_bytes / MIB:.0f} MiB")
    assert less_bytes >= 0.8 * capacity_bytes
    assert steered.status()["resident_bytes"] <= 0.02 * capacity_bytes


def test_the_first_release_is_whole_and_fast(steered: Served) -> None:
    (first,) = [said for line in steered.events() if (said := json.loads(line))["event"] == "release"][:1]
    status = steered.status()
    n_bytes = first["blocks"] * status["capacity_bytes"] // status["blocks"]
    speed = first["returned_bytes"] / first["seconds"] / 1e9
    print(f"{first['returned_bytes'] / n_bytes:.2%} of {n_bytes / MIB:.0f} MiB went back at {speed:.1f} GB/s")
    assert first["blocks"] == status["blocks"]
    assert first["returned_bytes"] >= 0.95 * n_bytes
    assert speed >= 5


def test_answers_are_the_same_with_all_blocks(stock: Stock, steered: Served) -> None:
    same(steered, stock, PROMPTS)


def test_memory_of_blocks_goes_back_while_idle_as_the_kernel_counts(steered: Served) -> None:
    steered.answers([f"{prompt} Again." for prompt in PROMPTS], 8)
    before, rss_bytes = steered.status(), steered.rss_bytes()
    settled(steered, FLOOR)
    until(lambda: steered.status()["committed_bytes"] <= FLOOR * before["capacity_bytes"] // before["blocks"])
    after = steered.status()
    n_bytes = before["committed_bytes"] - after["committed_bytes"]
    by_smaps, by_rss = before["resident_bytes"] - after["resident_bytes"], rss_bytes - steered.rss_bytes()
    print(f"{n_bytes / MIB:.1f} MiB of blocks: {by_smaps / MIB:.1f} MiB less by smaps, {by_rss / MIB:.1f} MiB of RSS")
    assert n_bytes > 40 * MIB
    assert after["returned_bytes"] > before["returned_bytes"]
    assert by_smaps >= 0.95 * n_bytes and by_rss >= 0.95 * n_bytes


def test_answers_are_the_same_while_inflated(stock: Stock, steered: Served) -> None:
    settled(steered, 4 * FLOOR)
    same(steered, stock, PROMPTS)
    assert steered.vllm_metric("kv_cache_usage_perc") == 0


def test_at_the_floor_all_requests_finish(stock: Stock, steered: Served) -> None:
    settled(steered, FLOOR)
    paused = steered.status()["pauses"]
    same(steered, stock, PROMPTS)
    print(f"{steered.status()['pauses'] - paused} times preempted with {FLOOR} blocks")
    assert steered.vllm_metric("num_requests_waiting") == 0


def test_a_running_batch_is_preempted_when_the_limit_falls(stock: Stock, steered: Served) -> None:
    settled(steered, 363)
    paused, prompts = steered.status()["pauses"], PROMPTS[:8]
    texts: list[str] = []
    asking = threading.Thread(target=lambda: texts.extend(steered.answers(prompts, N_TOKENS)))
    asking.start()
    until(lambda: steered.status()["used_bytes"] > 8 * steered.status()["capacity_bytes"] / 363, 60)
    steered.limit(FLOOR)
    until(lambda: steered.status()["pool_blocks"] == FLOOR, 60)
    assert steered.status()["pauses"] > paused
    asking.join()
    assert texts == [stock.texts[prompt] for prompt in prompts]


def test_while_memory_stalls_requests_wait_for_each_other(stock: Stock, steered: Served) -> None:
    settled(steered, 363)
    steered.stall(0.5)
    prompts, ended = PROMPTS[8:12], threading.Event()
    running: list[int] = []

    def watch() -> None:
        while not ended.wait(0.2):
            running.append(steered.status()["running"])

    watching = threading.Thread(target=watch)
    watching.start()
    assert steered.status()["concurrency_limit"] == 1
    same(steered, stock, prompts)
    ended.set()
    watching.join()
    assert max(running) == 1
    steered.stall(0.0)
    assert steered.status()["concurrency_limit"] == 8


def test_toggled_at_random_under_eight_clients_for_a_minute(stock: Stock, steered: Served) -> None:
    before = steered.status()
    wrong: list[str] = []
    answered = [0] * 8
    deadline_s = time.monotonic() + 60

    def ask(client: int) -> None:
        own = random.Random(client)
        while time.monotonic() < deadline_s:
            prompt = own.choice(PROMPTS)
            if steered.answer(prompt, N_TOKENS) != stock.texts[prompt]:
                wrong.append(prompt)
            answered[client] += 1

    clients = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    with steered.toggled(7, [FLOOR, 2 * FLOOR, 4 * FLOOR, 120, 363]):
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    after = steered.status()
    print(
        f"{sum(answered)} answers, {after['pauses'] - before['pauses']} times preempted, {after['releases']} releases, "
        f"{(after['returned_bytes'] - before['returned_bytes']) / MIB:.0f} MiB given back"
    )
    assert min(answered) > 0 and not wrong
    assert after["returned_bytes"] - before["returned_bytes"] > 100 * MIB
    assert after["governed"], after["reason"]


def test_clients_that_hang_up_leave_no_block_taken(stock: Stock, steered: Served) -> None:
    chance = random.Random(11)
    settled(steered, 363)
    for number in range(12):
        gone = [threading.Thread(target=steered.hang_up, args=(prompt, number % 3)) for prompt in PROMPTS[:8]]
        for thread in gone:
            thread.start()
        steered.limit(chance.choice([FLOOR, 2 * FLOOR, 120]))
        for thread in gone:
            thread.join()
    settled(steered, 2 * FLOOR)
    until(lambda: steered.vllm_metric("num_requests_running") == steered.vllm_metric("num_requests_waiting") == 0)
    until(lambda: steered.status()["used_bytes"] == 0)
    same(steered, stock, PROMPTS[:8])
    assert steered.status()["governed"], steered.status()["reason"]


def test_the_prefix_cache_can_be_reset_while_inflated(steered: Served) -> None:
    settled(steered, FLOOR)
    until(lambda: steered.vllm_metric("num_requests_running") == 0)
    steered.reset_prefix_cache()
    until(lambda: steered.status()["pool_blocks"] == FLOOR and steered.status()["committed_bytes"] == 0)


def test_a_governor_that_dies_leaves_vllm_its_blocks(stock: Stock, steered: Served) -> None:
    settled(steered, FLOOR)
    steered.stall(0.5)
    assert steered.status()["concurrency_limit"] == 1
    steered.limit(-1)
    time.sleep(11)
    assert steered.status()["concurrency_limit"] == 8, "what it sensed last does not count for ever"
    same(steered, stock, PROMPTS[:8])
    assert steered.status()["pool_blocks"] == 363
