"""Starts one variant on a board of its own, with what presses it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kvpsi.bench.admission.plan import PARALLEL, VARIANTS, Plan, Scenario
from kvpsi.bench.servers import Running, Setting, running
from kvpsi.board import BoardSettings, open_board

QUEUE = 64
# ends as soon as its standard input does, so that none is left however the bench ends
_BUSY = (
    "import os, signal, sys, threading\n"
    "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()\n"
    "while True: pass"
)


class Neighbours:
    """Processes that compute without end, while they are wanted."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def come(self, count: int) -> None:
        """Start so many."""
        for _ in range(count):
            self._processes.append(subprocess.Popen([sys.executable, "-c", _BUSY], stdin=subprocess.PIPE))

    def go(self) -> None:
        """End all."""
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes.clear()


@dataclass(slots=True)
class Subject:
    """One variant that answers at ``url``, and what may press it."""

    variant: str
    scenario: Scenario
    server: Running
    neighbours: Neighbours = field(default_factory=Neighbours)

    @property
    def url(self) -> str:
        """Of its API."""
        return self.server.url

    def status(self) -> dict[str, Any]:
        """What it says of itself."""
        with urllib.request.urlopen(f"{self.url}/kvpsi/status", timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    @contextlib.contextmanager
    def pressed(self) -> Iterator[None]:
        """While it lasts there are neighbours, in the scenario that has them; a quota is always there."""
        if self.scenario == "neighbours" and VARIANTS[self.variant].pressed:
            self.neighbours.come(os.cpu_count() or 1)
        try:
            yield
        finally:
            self.neighbours.go()


@contextlib.contextmanager
def serving(plan: Plan, variant: str, scenario: Scenario, report: Callable[[str], None]) -> Iterator[Subject]:
    """The server of a variant, on a board that is taken away with everything on it, however the bench ends."""
    how, n_cpus = VARIANTS[variant], os.cpu_count() or 1
    cpus = plan.cpus if scenario == "quota" and how.pressed else None
    matched = max(1, int(plan.cpus)) if scenario == "quota" else 1
    threads = {"stock": n_cpus, "matched": matched if how.pressed else n_cpus, "adaptive": 0}[how.threads]
    options = ("--queue", str(QUEUE), *how.options)
    setting = Setting(plan.model, plan.n_ctx, PARALLEL, threads, spill_max="0", options=options)
    report(f"{scenario}, starting {variant}")
    with open_board(BoardSettings(None, "shared", cpus)) as board:

        def start(command: Any) -> subprocess.Popen[Any]:
            return board.start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        with running("kvpsi", setting, start) as server:
            subject = Subject(variant, scenario, server)
            try:
                yield subject
            finally:
                subject.neighbours.go()
