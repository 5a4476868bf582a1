"""The processes of a bench: their ports, and whether they were killed, which is a result, or failed, which is not."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess

from kvpsi.board import BoardSettings, open_board
from kvpsi.errors import EnvironmentProblem, KvpsiError


def free_port() -> int:
    """A port of 127.0.0.1 at which nobody listens, nor is the kernel going to give it to somebody by itself before it
    is used: those are from 32768 on.

    Raises:
        EnvironmentProblem: there is none.
    """
    for port in random.sample(range(10_000, 32_768), 200):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise EnvironmentProblem("No free port was found between 10000 and 32767; end what listens there.")


def must_have_been_killed(process: subprocess.Popen[str]) -> None:
    """Wait for a model's process that did not get to its end, and close its pipes.

    Raises:
        KvpsiError: nobody killed it: it failed.
    """
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    if code >= 0:
        raise KvpsiError("A model's process of the bench ended early; its last lines above say why.")


def see_that_boards_can_be_made(settings: BoardSettings) -> None:
    """Make one and take it away again, before a bench spends minutes on what comes first.

    Raises:
        EnvironmentProblem: none can be made here; says why.
    """
    with open_board(settings):
        pass
