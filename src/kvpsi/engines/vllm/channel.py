"""How scheduler and workers talk: JSON lines over a socket without a file, as they are processes of their own.

The scheduler asks, a worker answers: ``{"release": [[first, end], ...]}`` gives back runs of blocks and tells how many
bytes, ``{"provide": [[first, end], ...]}`` has memory ready for some that are about to be written to, and
``{"resident": true}`` tells the memory of all blocks. Each has a ``number``, which the answer repeats. A worker answers
when it has done what it was asked, and closes the connection only when it does nothing any more: whatever comes, the
blocks are the scheduler's again.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kvpsi.engines.vllm.layout import BlockLayout, Run
from kvpsi.errors import EnvironmentProblem

_CONNECT_S = 5.0
_GREETING_S = 30.0
_PATIENCE_S = 1.0


def address_of(config: Any, rank: int) -> str:
    """The abstract address (unix(7)) of one worker of a ``VllmConfig``; it is gone with the process."""
    return f"\0kvpsi-vllm-{config.instance_id}-{config.parallel_config.data_parallel_index}-{rank}"


def _is_own(connection: socket.socket) -> bool:
    """Whether a process of the same user is at the other end: abstract addresses know no permissions."""
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return bool(uid == os.getuid())


class _Lines:
    """One end of a connection: a JSON object a line, each way."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = connection.makefile("r", encoding="utf-8")  # not for writing as well: that drops what was read

    def send(self, what: dict[str, Any]) -> None:
        """OSError if nobody is there."""
        self._connection.sendall(f"{json.dumps(what)}\n".encode())

    def close(self) -> None:
        """Read nothing any more; the connection ends only after this."""
        self._reader.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, self._reader)

    def receive(self) -> dict[str, Any]:
        """The next one; EnvironmentProblem if there is none, or it is not known."""
        try:
            line = self._reader.readline()
            told: dict[str, Any] = json.loads(line) if line else {}
        except (OSError, ValueError) as error:
            raise EnvironmentProblem(f"a worker cannot be understood ({error})") from error
        if not line:
            raise EnvironmentProblem("a worker is gone")
        return told


class ReleaseServer:
    """Releases blocks of one worker, in a thread of its own: also while the worker computes, or waits.

    Args:
        address: where it listens.
        layout: of the blocks.
    """

    def __init__(self, address: str, layout: BlockLayout) -> None:
        self.layout = layout
        self._connection: socket.socket | None = None
        self._has_ended = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(address)
        except OSError as error:
            self._listener.close()
            raise EnvironmentProblem(
                f"The worker cannot listen for the scheduler ({error.strerror}); start vLLM again."
            ) from error
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._run, name="kvpsi-release", daemon=True)

    def start(self) -> None:
        """Wait for the scheduler in the thread."""
        self._thread.start()

    def close(self) -> None:
        """Listen to nobody any more; returns when nothing is being given back. Call it before the memory of the blocks
        becomes somebody else's."""
        self._has_ended = True
        for each in (self._listener, self._connection):
            if each is not None:
                with contextlib.suppress(OSError):  # it ended by itself
                    each.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        with self._listener:
            while not self._has_ended:
                try:
                    connection, _ = self._listener.accept()
                except OSError:
                    if self._has_ended:
                        return
                    raise
                with connection, contextlib.suppress(OSError, ValueError):  # it is gone, or nobody to talk to
                    self._connection = connection
                    if _is_own(connection) and not self._has_ended:
                        self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.closing(_Lines(connection)) as lines:
            lines.send({"n_blocks": self.layout.n_blocks, "block_bytes": self.layout.block_bytes})
            for asked in lines:
                lines.send({**self._answer(asked), "number": asked.get("number")})

    def _answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        try:
            if "release" in asked:
                return {"bytes": self.layout.release([(first, end) for first, end in asked["release"]])}
            if "provide" in asked:
                self.layout.provide([(first, end) for first, end in asked["provide"]])
                return {"bytes": 0}
            return {"bytes": self.layout.resident_bytes()}
        except Exception as error:  # whatever it is, somebody waits for an answer
            return {"error": repr(error)}


class Workers:
    """The scheduler's end of the connections to all workers. May be used from any thread.

    Args:
        addresses: of all workers; each holds a part of every block.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._number = 0
        with contextlib.ExitStack() as stack:
            connected = [stack.enter_context(_connected(address)) for address in addresses]
            self._stack = stack.pop_all()
        self._lines = [lines for lines, _ in connected]
        told = [greeting for _, greeting in connected]
        self.n_blocks = min(int(each["n_blocks"]) for each in told)
        self.block_bytes = sum(int(each["block_bytes"]) for each in told)

    def release(self, runs: Iterable[Run]) -> int:
        """Have runs of blocks given back by all; the bytes that went back. Returns when it is done.

        Raises:
            EnvironmentProblem: a worker could not, or is gone; none of them works on it any more.
        """
        return self._ask({"release": list(runs)})

    def provide(self, runs: Iterable[Run]) -> None:
        """Have all find memory for runs of blocks, before vLLM writes to them. Returns when it is done.

        Raises:
            EnvironmentProblem: a worker is gone.
        """
        self._ask({"provide": list(runs)})

    def resident_bytes(self) -> int | None:
        """Memory of all blocks as the kernel counts it; None while the workers are busy with something else.

        Raises:
            EnvironmentProblem: a worker is gone.
        """
        if not self._lock.acquire(timeout=_PATIENCE_S):
            return None
        try:
            return self._ask_all({"resident": True})
        finally:
            self._lock.release()

    def _ask(self, what: dict[str, Any]) -> int:
        with self._lock:
            return self._ask_all(what)

    def _ask_all(self, what: dict[str, Any]) -> int:
        self._number += 1
        asked, problems, total_bytes = [], [], 0
        for lines in self._lines:
            try:
                lines.send({**what, "number": self._number})
                asked.append(lines)
            except (OSError, ValueError) as error:
                problems.append(f"a worker does not listen any more ({error})")
        for lines in asked:  # all of them, so that none still works on it
            try:
                total_bytes += int(self._answer_of(lines)["bytes"])
            except EnvironmentProblem as problem:
                problems.append(str(problem))
            except (KeyError, TypeError, ValueError) as error:
                problems.append(f"a worker cannot be understood ({error!r})")
        if problems:
            raise EnvironmentProblem(problems[0])
        return total_bytes

    def _answer_of(self, lines: _Lines) -> dict[str, Any]:
        """What was asked last; an earlier answer that nobody waited for is passed over."""
        while True:
            told = lines.receive()
            if told.get("number") == self._number:
                if "error" in told:
                    raise EnvironmentProblem(told["error"])
                return told

    def close(self) -> None:
        """End the connections."""
        with contextlib.suppress(OSError):
            self._stack.close()


@contextlib.contextmanager
def _connected(address: str) -> Iterator[tuple[_Lines, dict[str, Any]]]:
    """A connection, and what the worker says first."""
    deadline_s = time.monotonic() + _CONNECT_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        while True:
            try:
                connection.connect(address)
                break
            except OSError as error:
                if time.monotonic() > deadline_s:
                    raise EnvironmentProblem(
                        "kvpsi's worker is missing: start vLLM with --worker-cls "
                        f"kvpsi.engines.vllm.worker.ElasticWorker, or with KVPSI_VLLM=1 ({error.strerror})."
                    ) from error
                time.sleep(0.1)
        if not _is_own(connection):
            raise EnvironmentProblem("Another user listens in the place of a worker; start vLLM again.")
        connection.settimeout(_GREETING_S)  # somebody else may be there first
        with contextlib.closing(_Lines(connection)) as lines:
            greeting = lines.receive()
            connection.settimeout(None)
            yield lines, greeting
