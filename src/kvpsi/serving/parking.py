"""Saved conversations in files: written and read in a thread of its own, beside whatever is being answered."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from kvpsi.errors import SpillError
from kvpsi.kv.spill import Spilled, SpillFolder, is_spared
from kvpsi.models import cache_dir
from kvpsi.serving.sessions import Session, Sessions
from kvpsi.serving.thread import WorkThread

log = logging.getLogger("kvpsi")
R = TypeVar("R")

Do = Callable[[Callable[[], object]], object]
"""Has something done by the engine's thread."""

_SUPPOSED_BYTES_S = 200e6
_HOLD_OFF_S = 60.0
_PATIENCE_S = 5.0
_AT_ONCE_S = 1.0


class Parking:
    """Where conversations are parked. Used by the engine's thread.

    Nothing is written for a while after that failed (the disk is full), and nothing that is read again sooner by the
    model than written to the disk.

    Args:
        folder: for the files; None: nothing is parked.
        sessions: that are parked.
        do: has something done by the engine's thread.
        clock: seconds.

    Attributes:
        written, read_again, failures: how often.
        reading: the conversation whose file is being read; there is one at a time.
    """

    def __init__(
        self, folder: SpillFolder | None, sessions: Sessions, do: Do, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._sessions = sessions
        self._do = do
        sessions.remove_file = self.remove
        self._clock = clock
        self._thread = WorkThread("kvpsi-parking") if folder else None
        self._not_before_s = 0.0
        self._busy = False
        self._reading_since_s = 0.0
        self.reading: Session | None = None
        self.written = self.read_again = self.failures = 0

    @property
    def n_bytes(self) -> int:
        """Of all files."""
        return self._folder.n_bytes if self._folder else 0

    @property
    def is_on(self) -> bool:
        """Whether anything is parked at all."""
        return self._folder is not None

    @property
    def may_write(self) -> bool:
        """Whether another conversation may be written now."""
        return self._folder is not None and not self._busy and self._clock() >= self._not_before_s

    def read_s(self, n_bytes: int) -> float:
        """Seconds until so much is read."""
        folder = self._folder
        speed = (folder.read_bytes_s or folder.write_bytes_s) if folder else 0.0
        return n_bytes / (speed or _SUPPOSED_BYTES_S)

    def next(self, recompute_s: Callable[[int], float], least_idle_s: float) -> Session | None:
        """The least recently used conversation that is worth writing and for which no younger one's file has to go.

        Args:
            recompute_s: seconds until the model has read so many tokens.
            least_idle_s: for which nobody has been answering it.
        """
        if not self.may_write or self._folder is None:
            return None
        found, younger_bytes = None, 0
        idle_since_s = self._clock() - least_idle_s
        for session in sorted(self._sessions, key=lambda s: s.rank, reverse=True):
            if session.spilled is not None:
                younger_bytes += session.spilled.n_bytes
            elif (
                younger_bytes + session.n_bytes <= self._folder.most_bytes
                and session.idle_since_s <= idle_since_s
                and self.is_worth_it(session.n_bytes, recompute_s(len(session.tokens)))
            ):
                found = session
        return found

    def is_worth_it(self, n_bytes: int, recompute_s: float) -> bool:
        """Whether writing and reading so much takes less time than reading its tokens anew."""
        if self._folder is None:
            return False
        speed = self._folder.write_bytes_s
        return n_bytes / (speed or _SUPPOSED_BYTES_S) < recompute_s and self.read_s(n_bytes) < recompute_s

    def write(self, session: Session) -> None:
        """Begin to write a conversation; when that is done it is in a file, too."""
        folder, state = self._folder, session.state
        if folder is None or state is None or not self.may_write:
            return
        self._make_room(folder.most_bytes - session.n_bytes)
        self._submit(lambda: folder.write(state), lambda future: self._note_written(session, state, future))
        self._busy = session.is_written = True

    def write_at_once(self, session: Session) -> bool:
        """Write a conversation while everybody waits, a second at most; whether it is in a file then."""
        folder, state, thread = self._folder, session.state, self._thread
        if folder is None or thread is None or state is None or not self.may_write:
            return False
        self._make_room(folder.most_bytes - session.n_bytes)
        future = thread.call(lambda: folder.write(state))
        self._busy = session.is_written = True
        with contextlib.suppress(TimeoutError, Exception):  # whatever it was is told below
            future.result(_AT_ONCE_S)
        if future.done():
            self._note_written(session, state, future)
        else:
            future.add_done_callback(lambda done: self._do(lambda: self._note_written(session, state, done)))
        return session.spilled is not None

    def _make_room(self, most_bytes: int) -> None:
        """Have the oldest files removed until no more than so much is left."""
        sessions = self._sessions
        while sum(s.spilled.n_bytes for s in sessions if s.spilled) > most_bytes:
            oldest = sessions.oldest(lambda s: s.spilled is not None)
            if oldest is None:
                return
            if oldest.state is None:
                sessions.drop(oldest)
            elif oldest.spilled is not None:
                self.remove(oldest.spilled)
                oldest.spilled = None

    def _note_written(self, session: Session, state: mmap.mmap, future: Future[Spilled]) -> None:
        self._busy = session.is_written = False
        if session.state is not state:  # it was given up meanwhile
            state.close()
        try:
            spilled = future.result()
        except Exception as error:  # it is in memory all the same
            self._not_before_s = self._clock() + _HOLD_OFF_S
            log.warning("No conversation is parked for a while: %s", error)
            self.failures += 1
            return
        self.written += 1
        if session.is_gone:
            self.remove(spilled)
        else:
            session.spilled = spilled

    def reading_s(self) -> float:
        """For how long the file that is being read has been read."""
        return self._clock() - self._reading_since_s

    def read(self, session: Session) -> None:
        """Begin to read a conversation's file; one that cannot be read is removed."""
        folder, spilled = self._folder, session.spilled
        if folder is None or spilled is None:
            self._sessions.remove(session)
        elif self.reading is None:
            self._submit(lambda: folder.read(spilled), lambda future: self._note_read(session, future))
            self.reading, self._reading_since_s = session, self._clock()
            self._sessions.loading_bytes = spilled.n_bytes
            session.n_reads += 1

    def _note_read(self, session: Session, future: Future[mmap.mmap]) -> None:
        self.reading = None
        self._sessions.loading_bytes = 0
        try:
            state = future.result()
        except Exception as error:  # the model reads it again, then
            log.warning("A parked conversation is lost: %s", error)
            self.failures += 1
            if not session.is_gone:
                self._sessions.remove(session)
            return
        self.read_again += 1
        if session.is_gone or session.state is not None:
            state.close()
        else:
            self._sessions.reload(session, state)

    def remove(self, spilled: Spilled) -> None:
        """Have a file removed."""
        if self._folder is not None and self._thread is not None:
            with contextlib.suppress(RuntimeError):  # it is closed, and so all files are gone
                self._thread.call(self._folder.remove, spilled)

    def _submit(self, work: Callable[[], R], then: Callable[[Future[R]], None]) -> None:
        assert self._thread is not None
        future = self._thread.call(work)
        future.add_done_callback(lambda done: self._do(lambda: then(done)))

    def close(self) -> None:
        """Give up what is being written, and remove all files."""
        if self._thread is not None and self._folder is not None:
            self._folder.is_closing = True
            if self._thread.stop(_PATIENCE_S):  # else the disk hangs, and the next start removes what is there
                self._folder.close()


def open_folder(
    folder: Path | None, most_bytes: int, fingerprint: str, say: Callable[[str], None]
) -> SpillFolder | None:
    """Where to park, or None and a remark why not.

    Args:
        folder: that the user named; None: one beside the models, unless that wears out.
        most_bytes: of all files; 0: nothing is parked, which needs no remark.
        fingerprint: what must be the same for states to fit.
        say: takes the remark.

    Raises:
        SpillError: the folder that the user named cannot be used.
    """
    if not most_bytes:
        return None
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=16).digest()
    if folder is not None:
        return SpillFolder(folder, most_bytes=most_bytes, fingerprint=digest)
    usual = cache_dir() / "parked"
    if is_spared(usual):
        say(
            f"idle conversations are not written to {usual}, as it lies on flash that wears out; "
            "--spill-dir names a folder all the same"
        )
        return None
    try:
        return SpillFolder(usual, most_bytes=most_bytes, fingerprint=digest)
    except SpillError as error:
        say(f"idle conversations are not written to a file: {error}")
        return None
