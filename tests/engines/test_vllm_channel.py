"""Scheduler and worker over a real socket."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from kvpsi.engines.vllm import channel
from kvpsi.engines.vllm.channel import ReleaseServer, Workers, address_of
from kvpsi.engines.vllm.layout import BlockLayout, Plane, Run
from kvpsi.errors import EnvironmentProblem

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@dataclass(frozen=True)
class Told(BlockLayout):
    """Counts blocks instead of pages; raises what it is told to."""

    failure: BaseException | None = None

    def release(self, runs: Iterable[Run]) -> int:
        if self.failure is not None:
            raise self.failure
        return sum(end - first for first, end in runs)

    def resident_bytes(self) -> int:
        return 5


def a_worker(failure: BaseException | None = None, n_blocks: int = 8) -> str:
    address = f"\0kvpsi-test-{uuid.uuid4()}"
    ReleaseServer(address, Told(n_blocks, (Plane(0, 10, 10),), failure)).start()
    return address


def test_all_workers_release_and_tell() -> None:
    workers = Workers([a_worker(), a_worker(n_blocks=9)])
    assert (workers.n_blocks, workers.block_bytes) == (8, 20)
    assert workers.release([(1, 4), (6, 7)]) == 8
    assert workers.resident_bytes() == 10
    workers.provide([(1, 4)])
    workers.close()


def test_several_threads_may_ask() -> None:
    workers = Workers([a_worker()])
    told: list[int] = []
    threads = [threading.Thread(target=lambda n=n: told.append(workers.release([(0, n)]) - n)) for n in range(1, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [0] * 29
    workers.close()


def test_a_scheduler_that_comes_again_is_heard() -> None:
    address = a_worker()
    Workers([address]).close()
    workers = Workers([address])
    assert workers.release([(0, 2)]) == 2
    workers.close()


def test_what_the_kernel_refuses_is_told() -> None:
    workers = Workers([a_worker(), a_worker(OSError(22, "locked"))])
    with pytest.raises(EnvironmentProblem, match="locked"):
        workers.release([(0, 1)])
    assert workers.resident_bytes() == 10, "answers are not mixed up"
    workers.close()


def test_a_worker_whose_thread_dies_is_gone() -> None:
    workers = Workers([a_worker(SystemExit())])
    for _ in range(2):
        with pytest.raises(EnvironmentProblem, match="worker"):
            workers.release([(0, 1)])
    workers.close()


@pytest.mark.timeout(60)
def test_an_answer_that_nobody_waited_for_is_not_taken_for_the_next_one() -> None:
    workers = Workers([a_worker()])
    workers._lines[0].send({"release": [[0, 8]], "number": 0})
    assert workers.release([(0, 1)]) == 1
    assert workers.resident_bytes() == 5
    workers.close()


def test_who_looks_does_not_wait_for_what_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_PATIENCE_S", 0.05)
    workers = Workers([a_worker()])
    with workers._lock:
        assert workers.resident_bytes() is None
    assert workers.resident_bytes() == 5
    workers.close()


def test_after_close_nobody_is_answered_and_the_address_is_free() -> None:
    address, layout = f"\0kvpsi-test-{uuid.uuid4()}", Told(8, (Plane(0, 10, 10),))
    server = ReleaseServer(address, layout)
    server.start()
    workers = Workers([address])
    server.close()
    server.close()
    assert not server._thread.is_alive()
    with pytest.raises(EnvironmentProblem, match="worker"):
        workers.release([(0, 1)])
    workers.close()
    ReleaseServer(address, layout).close()


def test_who_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_GREETING_S", 0.05)
    address = f"\0kvpsi-test-{uuid.uuid4()}"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(address)
        other.listen(1)
        with pytest.raises(EnvironmentProblem, match="cannot be understood"):
            Workers([address])


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_CONNECT_S", 0.1)
    with pytest.raises(EnvironmentProblem, match="worker-cls"):
        Workers([f"\0kvpsi-test-{uuid.uuid4()}"])


def test_other_users_are_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    address = a_worker()
    monkeypatch.setattr(channel.os, "getuid", lambda: -1)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        assert connection.recv(1) == b""
    with pytest.raises(EnvironmentProblem, match="Another user"):
        Workers([address])


def test_two_workers_cannot_have_the_same_address() -> None:
    config = SimpleNamespace(instance_id=uuid.uuid4().hex, parallel_config=SimpleNamespace(data_parallel_index=0))
    assert address_of(config, 0) != address_of(config, 1)
    layout = Told(8, (Plane(0, 10, 10),))
    ReleaseServer(address_of(config, 0), layout).start()
    with pytest.raises(EnvironmentProblem, match="start vLLM again"):
        ReleaseServer(address_of(config, 0), layout)
