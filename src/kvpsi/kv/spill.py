"""Saved states in files, so that the memory of conversations that nobody is answering can go back and nothing is lost.

What is read back is the same bytes, or an error: a file that is missing, cut short, damaged or somebody else's is never
taken for a state. The folder of a process that was killed is removed by the next one that starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import mmap
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from kvpsi.errors import SpillError
from kvpsi.kv.statedata import StateBytes
from kvpsi.units import format_bytes

_OWN_PREFIX = "parked-"
_LOCK = ".lock"
_LOCK_S = 30.0
_SUFFIX = ".state"
_MAGIC = b"kvpsi state 1\n\0\0"
_HEADER = struct.Struct(f"<{len(_MAGIC)}sQ16s")
_DIGEST_BYTES = 16
_CHUNK_BYTES = 4 << 20
_LEAST_FREE_SHARE = 0.05
_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "rootfs"})
_SMOOTHING = 0.3


@dataclass(frozen=True, slots=True)
class Spilled:
    """A state that lies in a file: the size of the state, and the digest that it must have when it is read."""

    path: Path
    n_bytes: int
    digest: bytes


class SpillFolder:
    """Where states are written to. Used by one thread at a time.

    Args:
        folder: holds a folder for each user, for nobody else to read, and in it one for each process.
        most_bytes: of all states together.
        fingerprint: of whatever makes states fit together (the model, the type of its cache); at most 16 bytes.

    Attributes:
        n_bytes: of all states that are there.
        is_closing: set by any thread to have what is being written given up.
        write_bytes_s, read_bytes_s: as measured, in bytes a second; 0 before the first time.

    Raises:
        SpillError: the folder is in memory, or cannot be written.
    """

    def __init__(self, folder: Path, *, most_bytes: int, fingerprint: bytes) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        self.n_bytes = 0
        self.is_closing = False
        self.write_bytes_s = 0.0
        self.read_bytes_s = 0.0
        self._fingerprint = fingerprint
        self._numbers = itertools.count(1)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _refuse_memory(folder)
            folder = _of_this_user(folder)
            # nobody takes a folder for a leftover that is just being made
            with FileLock(folder / _LOCK, timeout=_LOCK_S, mode=0o600):
                _remove_leftovers(folder)
                self._own = Path(tempfile.mkdtemp(prefix=_OWN_PREFIX, dir=folder))
                self._lock = FileLock(self._own / _LOCK, mode=0o600)
                self._lock.acquire(timeout=0)
        except (OSError, NotImplementedError) as error:
            raise SpillError(
                f"{folder} cannot hold parked conversations ({getattr(error, 'strerror', None) or error}); "
                "give a folder that can be written with --spill-dir."
            ) from error

    def write(self, state: StateBytes) -> Spilled:
        """Write a state, through to the disk, so that no page of it stays in memory.

        Raises:
            SpillError: there is no room for it, or it could not be written; no file is left.
        """
        n_bytes = len(state)
        if self.n_bytes + n_bytes > self.most_bytes:
            raise SpillError(
                f"{self.folder} holds {format_bytes(self.n_bytes)} of parked conversations; no more may go in."
            )
        path = self._own / f"{next(self._numbers)}{_SUFFIX}"
        try:
            _refuse_full(self._own, n_bytes)
            began = time.monotonic()
            with _removed_unless_whole(path), memoryview(state) as view:
                digest = self._write(path, view)
            self.write_bytes_s = _smoothed(self.write_bytes_s, n_bytes, time.monotonic() - began)
        except OSError as error:
            raise SpillError(f"{path} could not be written ({error.strerror or error}).") from error
        self.n_bytes += n_bytes
        return Spilled(path, n_bytes, digest)

    def _write(self, path: Path, state: memoryview) -> bytes:
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        try:
            _write_whole(fd, memoryview(self._header(len(state))))
            for at in range(0, len(state), _CHUNK_BYTES):
                if self.is_closing:
                    raise SpillError("The folder is being closed.")
                with state[at : at + _CHUNK_BYTES] as chunk:
                    digest.update(chunk)
                    _write_whole(fd, chunk)
                _drop_cached(fd)
            _write_whole(fd, memoryview(digest.digest()))
            _drop_cached(fd)
        finally:
            os.close(fd)
        return digest.digest()

    def read(self, spilled: Spilled) -> mmap.mmap:
        """A state as it was written, in memory of its own. The file stays.

        Raises:
            SpillError: the file is not what was written.
        """
        began = time.monotonic()
        try:
            with spilled.path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != _HEADER.size + spilled.n_bytes + _DIGEST_BYTES:
                    raise SpillError(f"{spilled.path} was cut short or added to; the conversation is read again.")
                if file.read(_HEADER.size) != self._header(spilled.n_bytes):
                    raise SpillError(f"{spilled.path} is not of this model; the conversation is read again.")
                state = mmap.mmap(-1, spilled.n_bytes)
                try:
                    self._fill(state, file, spilled)
                except BaseException:
                    state.close()
                    raise
        except OSError as error:
            raise SpillError(
                f"{spilled.path} could not be read ({error.strerror or error}); the conversation is read again."
            ) from error
        self.read_bytes_s = _smoothed(self.read_bytes_s, spilled.n_bytes, time.monotonic() - began)
        return state

    def _fill(self, state: mmap.mmap, file: FileIO, spilled: Spilled) -> None:
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        with memoryview(state) as view:
            at = 0
            while at < len(view):
                if self.is_closing:
                    raise SpillError("The folder is being closed.")
                with view[at : at + _CHUNK_BYTES] as chunk:
                    n_read = file.readinto(chunk)
                    digest.update(chunk[:n_read])
                if not n_read:
                    break
                at += n_read
        in_file = file.read()
        _drop_cached(file.fileno(), written=False)
        if not digest.digest() == in_file == spilled.digest:
            raise SpillError(f"{spilled.path} was damaged; the conversation is read again.")

    def remove(self, spilled: Spilled) -> None:
        """Remove a state; it is not wanted any more."""
        with contextlib.suppress(OSError):
            spilled.path.unlink()
        self.n_bytes -= spilled.n_bytes

    def close(self) -> None:
        """Remove all that was written."""
        self._lock.release()
        _remove_own(self._own)

    def _header(self, n_bytes: int) -> bytes:
        return _HEADER.pack(_MAGIC, n_bytes, self._fingerprint)


def is_spared(folder: Path, blocks: Path = Path("/sys/class/block")) -> bool:
    """Whether a folder should not be written without being asked: on an SD card or eMMC, which wear out, or unknown."""
    device = Path(_mount_of(folder)[1])
    if not device.is_relative_to("/dev"):  # overlays, network and other file systems without a disk of their own
        return True
    try:
        return any("mmcblk" in str(disk) for disk in _disks_below(blocks / device.resolve().name))
    except OSError:
        return True


def _disks_below(block: Path) -> Iterator[Path]:
    """A block device and those that it is made of (LVM, LUKS, RAID)."""
    resolved = block.resolve(strict=True)
    yield resolved
    if (resolved / "slaves").is_dir():
        for each in (resolved / "slaves").iterdir():
            yield from _disks_below(each)


def _mount_of(folder: Path) -> tuple[str, str]:
    """File system and device of a folder that need not be there yet."""
    resolved = folder.resolve()
    mounts = [p for p in psutil.disk_partitions(all=True) if resolved.is_relative_to(p.mountpoint)]
    mount = max(mounts, key=lambda p: len(p.mountpoint), default=None)
    return (mount.fstype, mount.device) if mount else ("", "")


def _of_this_user(folder: Path) -> Path:
    """A folder in it that is this user's own, so that several users may name the same one."""
    own = folder / f"user-{os.getuid() if hasattr(os, 'getuid') else 0}"
    own.mkdir(exist_ok=True, mode=0o700)
    if own.is_symlink() or (hasattr(os, "getuid") and own.stat().st_uid != os.getuid()):
        raise SpillError(f"{own} is somebody else's; give another folder with --spill-dir.")
    return own


def _refuse_memory(folder: Path) -> None:
    """Raise SpillError if the folder's files lie in memory: nothing would be won."""
    kind = _mount_of(folder)[0]
    if kind in _IN_MEMORY:
        raise SpillError(f"{folder} is in memory ({kind}): give a folder on a disk with --spill-dir.")


def _refuse_full(folder: Path, n_bytes: int) -> None:
    usage = shutil.disk_usage(folder)
    if usage.free - n_bytes < _LEAST_FREE_SHARE * usage.total:
        raise SpillError(f"{folder} has only {format_bytes(usage.free)} free; nothing is parked there.")


def _remove_leftovers(folder: Path) -> None:
    """Folders whose process is gone: the kernel dropped its lock, however it ended."""
    for leftover in folder.glob(f"{_OWN_PREFIX}*"):
        if leftover.is_symlink() or not (leftover / _LOCK).is_file():
            continue  # not made here
        lock = FileLock(leftover / _LOCK, mode=0o600)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue
        lock.release()
        _remove_own(leftover)


def _remove_own(folder: Path) -> None:
    """Remove a folder of states, and nothing else that somebody may have put there."""
    with contextlib.suppress(OSError):
        for state in folder.glob(f"*{_SUFFIX}"):
            state.unlink()
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()


@contextlib.contextmanager
def _removed_unless_whole(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _write_whole(fd: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        with data[done:] as rest:  # also after an error nobody holds on to memory that has to go back
            done += os.write(fd, rest)


def _drop_cached(fd: int, *, written: bool = True) -> None:
    """Have the kernel keep no page of a file: it would be charged to us like the memory that it came from."""
    if written:
        os.fsync(fd)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _smoothed(before: float, n_bytes: int, seconds: float) -> float:
    now = n_bytes / max(seconds, 1e-6)
    return now if before == 0.0 else before + _SMOOTHING * (now - before)
