"""The processes of a bench: their ports, and whether they were killed, which is a result, or failed, which is not."""

from __future__ import annotations

import socket
import subprocess

from kvpsi.board import BoardSettings, open_board
from kvpsi.errors import KvpsiError


def free_port() -> int:
    """A port of 127.0.0.1 at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


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
