"""A process that cleans up after another one, however that ends.

It reads from standard input, line by line, what will have to be undone: ``{"cgroup": PATH}`` or ``{"zram": NUMBER}``.
When the input ends, because the other process closed it or is dead, it undoes all of it, the last first, and tells on
standard output what it could not undo. It heeds no signal but kill -9.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvpsi.board import zram
from kvpsi.board.cgroups import remove_tree
from kvpsi.errors import EnvironmentProblem


class Janitor:
    """The process, as the one that started it sees it. Start it before anything is made."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from kvpsi.board.janitor import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # out of reach of the terminal's Ctrl-C
        )

    def will_undo(self, kind: str, what: str | int) -> None:
        """Have something undone at the end; say so before it is made.

        Raises:
            EnvironmentProblem: the janitor is gone.
        """
        assert self._process.stdin is not None
        try:
            print(json.dumps({kind: what}), file=self._process.stdin, flush=True)
        except OSError as error:
            raise EnvironmentProblem("The board's janitor was ended, so nothing is made: try again.") from error

    def finish(self) -> str:
        """Have it undo everything now; a sentence about what is left, empty if nothing is."""
        left, _ = self._process.communicate()
        return left.strip()


def _undo(kind: str, what: Any) -> str:
    try:
        if kind == "cgroup":
            remove_tree(Path(what))
        elif kind == "zram":
            zram.take_away(int(what))
    except (OSError, EnvironmentProblem) as error:
        return f"The {kind} {what} could not be removed ({error}); remove it by hand."
    return ""


def main() -> None:
    """Collect until the input ends, then undo."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    things = [json.loads(line) for line in sys.stdin]
    left = [_undo(kind, what) for thing in reversed(things) for kind, what in thing.items()]
    told = " ".join(sentence for sentence in left if sentence)
    if told:
        try:
            print(told, flush=True)
        except OSError:  # nobody is there any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
