"""One thread computes: libgomp keeps workers for every thread that ever did, and all of them slow down."""

from __future__ import annotations

import json
import threading
import urllib.request
from pathlib import Path

import pytest

from kvpsi.serving.thread import ComputingThread
from support.servers import serving


def test_it_does_what_it_is_given_in_order_and_tells_what_came_of_it() -> None:
    thread = ComputingThread()
    done: list[int] = []
    futures = [thread.call(done.append, number) for number in range(50)]
    where = thread.call(threading.get_ident)
    failing = thread.call(int, "none")
    thread.stop()
    assert all(future.result() is None for future in futures) and done == list(range(50))
    assert where.result() != threading.get_ident()
    with pytest.raises(ValueError, match="none"):
        failing.result()
    with pytest.raises(RuntimeError, match="stopped"):
        thread.call(threading.get_ident)


@pytest.mark.engine
def test_a_second_thread_of_the_model_is_one_more_and_no_other(default_model: Path, tmp_path: Path) -> None:
    counts = []
    for n_threads in ("1", "2"):
        with serving(default_model, tmp_path, "-c", "512", "-t", n_threads) as served:
            body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}).encode()
            request = urllib.request.Request(
                f"{served.url}/v1/chat/completions", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert answer.status == 200
            counts.append(len(list(Path(f"/proc/{served.process.pid}/task").iterdir())))
    assert counts[1] <= counts[0] + 1, "a pool of workers for one thread, not for two"
