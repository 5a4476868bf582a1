"""Priorities, deadlines and coming again, as clients of a real server see them."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvpsi.serving.api.headers import flow_of, urgency_of, wait_s_of
from support.servers import Served, serving


def http(**headers: str) -> SimpleNamespace:
    from starlette.datastructures import Headers

    return SimpleNamespace(
        headers=Headers({name.replace("_", "-"): value for name, value in headers.items()}),
        client=SimpleNamespace(host="192.0.2.1"),
    )


@pytest.mark.parametrize(
    ("value", "urgency"),
    [("u=0", 0), ("u=7", 7), ("u=5, i", 5), ("i, u=1", 1), ("u=8", 3), ("u=-1", 3), ("high", 3), ("", 3), ("u=12", 3)],
)
def test_urgency(value: str, urgency: int) -> None:
    assert urgency_of(http(priority=value)) == urgency  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [
        ("wait=30", 30.0),
        ("respond-async, wait=1.5", 1.5),
        ('Wait="10"', 10.0),
        ("wait=soon", None),
        ("wait=-3", None),
        ("await=3", None),
        ("", None),
    ],
)
def test_how_long_it_is_waited_for(value: str, wait_s: float | None) -> None:
    assert wait_s_of(http(prefer=value)) == wait_s  # type: ignore[arg-type]


def test_whose_a_request_is() -> None:
    assert flow_of(http(authorization="Bearer secret")) == flow_of(http(x_api_key="secret"))  # type: ignore[arg-type]
    assert flow_of(http(authorization="Bearer other")) != flow_of(http(x_api_key="secret"))  # type: ignore[arg-type]
    assert "192.0.2.1" in flow_of(http())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def served(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with serving(default_model, folder, "-c", "4096", "-np", "1", "--queue", "2") as served:
        yield served


def post(served: Served, prompt: str, max_tokens: int, **headers: str) -> tuple[int, float | None, float]:
    """Status, how long to wait before coming again, and when it ended."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    request = urllib.request.Request(
        f"{served.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", **headers},
        method="POST",
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            response.read()
            return response.status, None, time.monotonic()
    except urllib.error.HTTPError as error:
        assert int(error.headers["Retry-After"]) >= 1
        assert json.loads(error.read())["error"]["type"] == "rate_limit_error"
        return error.code, float(error.headers["retry-after-ms"]) / 1000, time.monotonic()


class Busy:
    """Requests that are on their way; each has a thread of its own."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.done: dict[str, tuple[int, float | None, float]] = {}
        self.threads: list[threading.Thread] = []

    def ask(self, name: str, max_tokens: int, **headers: str) -> None:
        def do() -> None:
            self.done[name] = post(self.served, f"{name} is a story about", max_tokens, **headers)

        waiting = self.served.get("/v1/kvpsi/status")
        before = waiting["waiting"] + waiting["running"]
        self.threads.append(threading.Thread(target=do))
        self.threads[-1].start()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            now = self.served.get("/v1/kvpsi/status")
            if name in self.done or now["waiting"] + now["running"] > before:
                return
            time.sleep(0.02)

    def wait(self) -> None:
        for thread in self.threads:
            thread.join()


@pytest.mark.engine
def test_the_more_urgent_is_answered_first_and_the_least_gives_way(served: Served) -> None:
    busy = Busy(served)
    busy.ask("The first", 100)
    busy.ask("The usual", 4)
    busy.ask("The patient", 4, Priority="u=6")
    busy.ask("The urgent", 4, Priority="u=0")
    busy.wait()
    assert busy.done["The patient"][0] == 429
    assert busy.done["The urgent"][0] == busy.done["The usual"][0] == 200
    assert busy.done["The urgent"][2] < busy.done["The usual"][2]
    assert served.get("/v1/kvpsi/status")["rejected"]["displaced"] >= 1


@pytest.mark.engine
def test_what_comes_too_late_is_told_at_once_and_coming_again_is_worth_it(served: Served) -> None:
    busy = Busy(served)
    busy.ask("A long one", 250)
    time.sleep(1)
    began = time.monotonic()
    status, again_s, ended = post(served, "A hurried one asks", 8, Prefer="wait=0.5")
    assert status == 429 and again_s is not None and ended - began < 0.45
    assert served.get("/v1/kvpsi/status")["promises"] >= 1
    time.sleep(again_s)
    assert post(served, "A hurried one asks", 8, Prefer="wait=30")[0] == 200
    busy.wait()
    assert busy.done["A long one"][0] == 200
