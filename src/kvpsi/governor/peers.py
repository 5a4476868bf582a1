"""Who else is governed on this machine: every process keeps a small record of itself in a folder that all of them read.

There is nobody in the middle. A process holds a lock on its record for as long as it lives (flock(2)), which the kernel
drops however it ends; whoever meets a record without a lock removes it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from kvpsi.governor.shares import Claim

try:
    import fcntl
except ImportError:  # not on Windows: there everybody is alone
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("kvpsi")

NOBODY = "none"
"""As a folder's name: to know of nobody, and not to be known."""
_SUFFIX = ".record"
_NEW = ".new-"
_UNFINISHED_S = 60.0
_MOST_BYTES = 4096
_MOST_NUMBER = 1 << 60
_SIZES = tuple(field.name for field in fields(Claim) if field.name.endswith("_bytes"))


@dataclass(frozen=True, slots=True)
class Record:
    """What a governed cache tells of itself.

    Attributes:
        time_s: when, on the clock that all processes have in common (``CLOCK_MONOTONIC``).
        scopes: whose limits it lives under, as `kvpsi.pressure.Reading` names them.
        claim: what it holds and wants.
        returned_bytes: all that it ever gave back, a counter.
        name: of the record, which nobody else has.
    """

    time_s: float
    scopes: tuple[str, ...]
    claim: Claim
    returned_bytes: int
    name: str = ""


class Peers(Protocol):
    """The others, as far as one can know of them."""

    def exchange(self, record: Record) -> Sequence[Record]:
        """Tell them of oneself, and what they told last; never raises."""
        ...

    def close(self) -> None:
        """Be gone; may be called twice."""
        ...


def folder_named(name: str = "", environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder of this name, else ``$KVPSI_SHARE_DIR``, else one of this user's own; None if that is ``none``.

    Its own is ``/run/kvpsi`` for root, else ``kvpsi`` in ``$XDG_RUNTIME_DIR`` or in the folder for temporary files.
    """
    if named := name or environ.get("KVPSI_SHARE_DIR"):
        return None if named == NOBODY else Path(named)
    uid = os.getuid() if hasattr(os, "getuid") else 0
    if uid == 0:
        return Path("/run/kvpsi")
    if own := environ.get("XDG_RUNTIME_DIR"):
        return Path(own) / "kvpsi"
    return Path(tempfile.gettempdir()) / f"kvpsi-{uid}"


def open_peers(folder: Path | None) -> PeerFolder | None:
    """Those whose records lie in a folder; None, and a warning, if none can be kept there."""
    if folder is None or fcntl is None:
        return None
    try:
        return PeerFolder(folder)
    except OSError as error:
        log.warning(
            "kvpsi shares memory with nobody, as %s cannot hold records (%s); name a folder with --share-dir or "
            "KVPSI_SHARE_DIR.",
            folder,
            error.strerror or error,
        )
        return None


class PeerFolder:
    """`Peers` in a folder. Used by one thread.

    Args:
        folder: made if it is not there, for this user only.

    Raises:
        OSError: no record can be kept there, or the folder is somebody else's whom not everybody trusts.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = folder
        self._fd = -1
        self._path = folder
        self._known: dict[str, Record] = {}
        self._failed = False
        _refuse_strangers(folder)
        _remove_unfinished(folder)
        self._open()

    def exchange(self, record: Record) -> Sequence[Record]:
        """See `Peers`."""
        if self._fd < 0:
            return ()
        try:
            if not os.fstat(self._fd).st_nlink:  # somebody cleared the folder
                self._reopen()
            os.pwrite(self._fd, _packed(record), 0)
            names = [entry.name for entry in os.scandir(self.folder)]
        except OSError as error:
            log.log(
                logging.DEBUG if self._failed else logging.WARNING,
                "kvpsi shares memory with nobody for the time being, as %s cannot be written (%s).",
                self.folder,
                error.strerror or error,
            )
            self._failed = True
            return ()
        known, self._known = self._known, {}
        for name in names:
            if name.endswith(_SUFFIX) and name != self._path.name:
                found = self._look(name, known.get(name))
                if found is not None:
                    self._known[name] = found
        return tuple(self._known.values())

    def close(self) -> None:
        """Remove the record."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        """Make a record that is locked before it has a name that others look for."""
        fd, name = tempfile.mkstemp(prefix=_NEW, dir=self.folder)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(fd, 0o644)  # in a folder for several users all of them read it
            self._path = Path(name).rename(self.folder / f"{os.getpid()}-{Path(name).name[len(_NEW) :]}{_SUFFIX}")
        except BaseException:
            Path(name).unlink(missing_ok=True)
            os.close(fd)
            raise
        self._fd = fd

    def _reopen(self) -> None:
        os.close(self._fd)
        self._fd = -1
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._open()

    def _look(self, name: str, known: Record | None) -> Record | None:
        """What a record says, or what is known of it if it is just being written.

        None if it is nobody's any more; then it is removed.
        """
        path = f"{self.folder}/{name}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            if _is_locked(fd):
                return _unpacked(os.pread(fd, _MOST_BYTES, 0), name) or known
            Path(path).unlink(missing_ok=True)
        except OSError:
            return None
        finally:
            os.close(fd)
        return None


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _remove_unfinished(folder: Path) -> None:
    """Remove what a process left that was killed just when it began."""
    for path in folder.glob(f"{_NEW}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _UNFINISHED_S:
                path.unlink()


def _refuse_strangers(folder: Path) -> None:
    """Raise PermissionError for a folder that is neither this user's nor root's: its owner could pretend anything."""
    owner = folder.stat().st_uid
    if owner not in (0, os.getuid()):
        raise PermissionError(f"it belongs to user {owner}")


def _packed(record: Record) -> bytes:
    """A line of JSON, its checksum, and blanks up to the same length always, as what was there is written over."""
    text = json.dumps(asdict(record), separators=(",", ":"))
    line = f"{text}\n{zlib.crc32(text.encode()):08x}\n".encode()
    if len(line) > _MOST_BYTES:
        raise OSError("the record is too long")
    return line.ljust(_MOST_BYTES)


def _unpacked(data: bytes, name: str) -> Record | None:
    """The record; None if it is not whole, or says what cannot be."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        text, checksum = data.rstrip().decode().split("\n")
        if zlib.crc32(text.encode()) == int(checksum, 16):
            return _record_of(json.loads(text), name)
    return None


def _record_of(told: dict[str, Any], name: str) -> Record:
    said = told["claim"]
    sizes = {key: int(said[key]) for key in _SIZES}
    weight, priority, time_s = float(said["weight"]), int(said["priority"]), float(told["time_s"])
    numbers = (*sizes.values(), int(told["returned_bytes"]))
    if not all(0 <= n < _MOST_NUMBER for n in numbers) or not 0 < weight < math.inf or not math.isfinite(time_s):
        raise ValueError("it says what cannot be")
    scopes = tuple(str(scope) for scope in told["scopes"])
    return Record(time_s, scopes, Claim(**sizes, weight=weight, priority=priority), numbers[-1], name)
