"""The ports of a bench's servers."""

from __future__ import annotations

import contextlib
import random
import socket

import pytest

from kvpsi.bench.processes import free_port
from kvpsi.errors import EnvironmentProblem


def test_a_port_is_free_and_none_that_the_kernel_gives_away() -> None:
    port = free_port()
    assert 10_000 <= port < 32_768
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_a_port_that_is_taken_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, other = free_port(), free_port()
    with contextlib.closing(socket.create_server(("127.0.0.1", taken))):
        monkeypatch.setattr(random, "sample", lambda *_: [taken, other])
        assert free_port() == other
        monkeypatch.setattr(random, "sample", lambda *_: [taken])
        with pytest.raises(EnvironmentProblem, match="No free port"):
            free_port()
