"""The limit of kvcached (https://github.com/ovg-project/kvcached), which makes the KV caches of vLLM and SGLang elastic
on GPUs: driven through its own command ``kvctl``, which lists what is used and sets the limit.

kvcached unmaps what is beyond the limit as soon as nobody uses it; what the engines have no room for they preempt and
compute again, so nothing is forgotten.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvpsi.errors import EnvironmentProblem, UsageError
from kvpsi.status import CacheStatus

_TIMEOUT_S = 30.0
_STEP_SHARE = 0.01
_LOOK_S = 1.0
_MOST_FAILURES = 5


@dataclass(frozen=True, slots=True)
class KvcachedSizes:
    """Of one cache, in bytes, over all its layers."""

    limit_bytes: int
    used_bytes: int


class Kvctl:
    """kvcached's command for one cache.

    Args:
        name: of its shared memory, as ``kvctl list`` has it.
        command: how it is called.
    """

    def __init__(self, name: str, command: Sequence[str] = ("kvctl",)) -> None:
        self.name = name
        self._command = tuple(command)

    def sizes(self) -> KvcachedSizes:
        """As of now.

        Raises:
            EnvironmentProblem: there is no such command, or it did not answer as kvcached 0.1 does.
            UsageError: there is no such cache.
        """
        told = self._run("list", "--json", self.name)
        try:
            found = {each["ipc"]: KvcachedSizes(int(each["limit_bytes"]), int(each["used_bytes"])) for each in told}
        except (TypeError, KeyError, ValueError) as error:
            raise EnvironmentProblem(f"kvctl list answered something unknown ({error!r}); kvcached 0.1 is.") from error
        if self.name not in found:
            raise UsageError(f"kvcached has no cache {self.name!r}; `kvctl list` tells which there are.")
        return found[self.name]

    def set_limit(self, limit_bytes: int) -> None:
        """Bound it.

        Raises:
            EnvironmentProblem: there is no such command, or it failed.
        """
        self._run("limit", self.name, str(limit_bytes))

    def _run(self, *arguments: str) -> list[Any]:
        try:
            done = subprocess.run(
                [*self._command, *arguments],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=True,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C ends kvpsi, which then sets the limit once more
            )
            return list(json.loads(done.stdout)) if "--json" in arguments else []
        except FileNotFoundError as error:
            raise EnvironmentProblem("The command kvctl is missing: `pip install kvcached` installs it.") from error
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise EnvironmentProblem(f"kvctl {arguments[0]} failed ({error}).") from error


class KvcachedCache:
    """What a governor governs; from any thread. A call of kvctl that fails once or twice is ridden out.

    Args:
        control: of the cache.
        floor_bytes: below this the limit never gets: what one request of the longest context needs.
        most_bytes: the limit while nobody needs memory; None: what it is now.
        clock: seconds.

    Attributes:
        returned_bytes: what was in use when a limit was lowered, and then was not any more.
    """

    def __init__(
        self,
        control: Kvctl,
        *,
        floor_bytes: int,
        most_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._control, self._clock = control, clock
        self._sizes = control.sizes()
        self.most_bytes = self._sizes.limit_bytes if most_bytes is None else most_bytes
        if not 0 < floor_bytes <= self.most_bytes:
            raise UsageError(
                f"The cache keeps {floor_bytes} bytes at least, of {self.most_bytes} at most: give --floor between 0 "
                "and that."
            )
        self._floor_bytes = floor_bytes
        self._wanted_bytes = self._sizes.limit_bytes
        self._set_bytes: int | None = self._wanted_bytes  # None: not known, as a call failed
        self._failures = {"list": 0, "limit": 0}
        self._lock = threading.RLock()
        self._looked_s = clock()
        self.returned_bytes = 0

    def status(self) -> CacheStatus:
        """Sizes as of a second ago at most; all can be had again, as the engines compute what they lack."""
        with self._lock:
            self._look()
            used = self._sizes.used_bytes
        return CacheStatus(
            capacity_bytes=self.most_bytes,
            used_bytes=used,
            floor_bytes=self._floor_bytes,
            returned_bytes=self.returned_bytes,
            lossless_bytes=used,
        )

    def set_limit(self, limit_bytes: int, chunk_tokens: int | None) -> None:  # noqa: ARG002
        """Bound it; more than now, or less than now by more than a hundredth of all, is told to kvcached at once. The
        pieces of prompts are the engine's own."""
        with self._lock:
            self._wanted_bytes = min(self.most_bytes, max(self._floor_bytes, limit_bytes))
            far = self._set_bytes is None or abs(self._wanted_bytes - self._set_bytes) > _STEP_SHARE * self.most_bytes
            if far or self._wanted_bytes == self.most_bytes:
                self._tell()

    def give_now(self) -> int | None:
        """Have kvcached keep to the limit; the bytes that went back by the next look."""
        with self._lock:
            before = self.returned_bytes
            self._tell()
            self._look(now=True)
            return self.returned_bytes - before

    def interrupt(self) -> bool:
        """False: an engine's step goes to its end."""
        return False

    def close(self) -> None:
        """Set the limit to the most, after what is being set.

        Raises:
            EnvironmentProblem: kvctl failed, so the limit is as it was last.
        """
        with self._lock:
            if self._set_bytes != self.most_bytes:
                self._control.set_limit(self.most_bytes)
                self._set_bytes = self.most_bytes

    def _tell(self) -> None:
        wanted_bytes = self._wanted_bytes
        if wanted_bytes != self._set_bytes:
            self._set_bytes = None
            with self._riding_out("limit"):
                self._control.set_limit(wanted_bytes)
                self._set_bytes = wanted_bytes

    def _look(self, *, now: bool = False) -> None:
        if not now and self._clock() - self._looked_s < _LOOK_S:
            return
        before = self._sizes
        with self._riding_out("list"):
            had_failed = self._failures["list"] > 0
            self._sizes = self._control.sizes()
            if had_failed:  # an engine that has started again has a limit of its own
                self._set_bytes = None
        self._looked_s = self._clock()
        if self._set_bytes is not None and self._set_bytes < before.used_bytes:
            self.returned_bytes += max(0, before.used_bytes - self._sizes.used_bytes)

    @contextlib.contextmanager
    def _riding_out(self, what: str) -> Iterator[None]:
        """An engine that starts again has no cache for a moment."""
        try:
            yield
            self._failures[what] = 0
        except (EnvironmentProblem, UsageError):
            self._failures[what] += 1
            if self._failures[what] >= _MOST_FAILURES:
                raise
