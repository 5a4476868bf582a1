"""A scheduler and a worker that do what a test writes into files: the rest of them is what users run."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvpsi.engines.vllm.balloon import Balloon
from kvpsi.engines.vllm.layout import BlockLayout, Run
from kvpsi.engines.vllm.scheduler import ElasticScheduler
from kvpsi.engines.vllm.worker import ElasticWorker
from kvpsi.governor import LawSettings
from kvpsi.pressure.reading import Headroom, Reading, Stall, StallLine, Swap

FOLDER = Path(os.environ.get("KVPSI_TEST_FOLDER", "/nonexistent"))


class Steering:
    """In the governor's place: every 20 ms the limit in blocks, from the file ``limit``, if it is there."""

    decision = None
    stall_s = 0.0
    settings = LawSettings()

    def __init__(self, balloon: Balloon) -> None:
        self._balloon = balloon
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def reading(self) -> Reading | None:
        """Memory stall as the file ``stall`` says; None without it."""
        try:
            share = float((FOLDER / "stall").read_text())
        except (OSError, ValueError):
            return None
        room = Headroom(0, 0.0, 0, 0, 0, "system")
        return Reading(0.0, 0.1, room, Stall(StallLine(share)), Stall(), Stall(), Swap())

    def explained(self) -> list[str]:
        return []

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            try:
                limit_blocks = int((FOLDER / "limit").read_text())
            except (OSError, ValueError):
                continue
            if limit_blocks < 0:
                return  # as if it had died
            self._balloon.set_limit(limit_blocks * self._balloon.settings.block_bytes, None)
            self._balloon.give_now()


class SteeredScheduler(ElasticScheduler):
    """Governed by a file."""

    def make_governor(self, balloon: Balloon, *_: Any) -> Any:
        """See `Steering`."""
        return Steering(balloon)


class MortalWorker(ElasticWorker):
    """Its thread ends in the middle of a release as soon as there is a file ``die``."""

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """As the worker does."""
        super().initialize_from_config(kv_cache_config)
        server = self.release_server
        server.layout = MortalLayout(server.layout.n_blocks, server.layout.planes)


class MortalLayout(BlockLayout):
    """See `MortalWorker`."""

    def release(self, runs: Iterable[Run]) -> int:
        """As the layout does, if it does."""
        if (FOLDER / "die").exists():
            raise SystemExit
        return super().release(runs)
