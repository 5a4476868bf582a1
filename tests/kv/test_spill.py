"""States in files: what comes back is what was written, or an error; nothing is left behind."""

from __future__ import annotations

import mmap
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvpsi.errors import SpillError
from kvpsi.kv.pages import Mapping, present_bytes
from kvpsi.kv.spill import SpillFolder, is_spared

MIB = 1 << 20
MODEL = b"model one, f16"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[SpillFolder]:
    spill = SpillFolder(tmp_path / "parked", most_bytes=64 * MIB, fingerprint=MODEL)
    yield spill
    spill.close()
    assert not list((tmp_path / "parked").rglob("parked-*"))


@pytest.mark.parametrize("n_bytes", [1, 4 * MIB, 9 * MIB + 1])
def test_what_comes_back_is_what_went(folder: SpillFolder, n_bytes: int) -> None:
    state = os.urandom(n_bytes)
    spilled = folder.write(state)
    with folder.read(spilled) as back:
        assert bytes(back) == state
    assert folder.n_bytes == n_bytes and folder.write_bytes_s > 0 and folder.read_bytes_s > 0
    folder.remove(spilled)
    assert folder.n_bytes == 0 and not spilled.path.exists()


def test_nobody_else_may_read_it(folder: SpillFolder) -> None:
    path = folder.write(b"said in confidence").path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_no_page_of_it_stays_in_memory(folder: SpillFolder) -> None:
    spilled = folder.write(os.urandom(8 * MIB))
    assert _cached_bytes(spilled.path) < MIB
    folder.read(spilled).close()
    assert _cached_bytes(spilled.path) < MIB


def _cached_bytes(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        array = np.frombuffer(mapped, dtype=np.uint8)
        start, n_bytes = array.ctypes.data, len(array)
        del array
        return present_bytes([Mapping(start, start + n_bytes // mmap.PAGESIZE * mmap.PAGESIZE)])


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 20)


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def _flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _flip_in_the_digest(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _replace_by_another(path: Path) -> None:
    other = SpillFolder(path.parent.parent.parent, most_bytes=MIB, fingerprint=MODEL)
    path.write_bytes(other.write(b"y" * 5000).path.read_bytes())
    other.close()


def _replace_by_another_models(path: Path) -> None:
    other = SpillFolder(path.parent.parent.parent, most_bytes=MIB, fingerprint=b"model two")
    path.write_bytes(other.write(b"x" * 5000).path.read_bytes())
    other.close()


@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        _cut,
        _lengthen,
        _flip_one_bit,
        _flip_in_the_digest,
        _replace_by_another,
        _replace_by_another_models,
    ],
)
def test_what_is_not_as_it_was_written_is_no_state(folder: SpillFolder, spoil: Callable[[Path], None]) -> None:
    spilled = folder.write(b"x" * 5000)
    spoil(spilled.path)
    with pytest.raises(SpillError, match="read again"):
        folder.read(spilled)


def test_no_more_than_was_allowed(folder: SpillFolder) -> None:
    folder.write(b"x" * (60 * MIB))
    with pytest.raises(SpillError, match="no more may go in"):
        folder.write(b"y" * (5 * MIB))
    assert folder.n_bytes == 60 * MIB


def test_a_write_that_fails_leaves_no_file(folder: SpillFolder) -> None:
    path = folder.write(b"small").path
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 * MIB, before[1]))  # the kernel refuses to write on
    try:
        with pytest.raises(SpillError, match="could not be written"):
            folder.write(os.urandom(10 * MIB))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", path.name]
    assert folder.n_bytes == 5
    folder.write(os.urandom(10 * MIB))


def test_what_is_being_written_can_be_given_up(folder: SpillFolder) -> None:
    folder.is_closing = True
    with pytest.raises(SpillError, match="closed"):
        folder.write(b"x" * MIB)
    assert folder.n_bytes == 0


def test_memory_is_no_place_for_what_must_leave_memory() -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no /dev/shm here, so no folder in memory to be refused")
    with pytest.raises(SpillError, match="in memory"):
        SpillFolder(Path("/dev/shm/kvpsi-test"), most_bytes=MIB, fingerprint=MODEL)
    Path("/dev/shm/kvpsi-test").rmdir()


def test_a_folder_of_somebody_elses_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"user-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SpillError, match="somebody else's"):
        SpillFolder(tmp_path, most_bytes=MIB, fingerprint=MODEL)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SpillError, match="--spill-dir"):
        SpillFolder(tmp_path / "file" / "parked", most_bytes=MIB, fingerprint=MODEL)


_WRITES_FOR_EVER = """
import sys, pathlib
from kvpsi.kv.spill import SpillFolder
spill = SpillFolder(pathlib.Path(sys.argv[1]), most_bytes=1 << 30, fingerprint=b"m")
spill.write(b"a" * 5000)
print("ready", flush=True)
while True:
    spill.remove(spill.write(b"b" * (32 << 20)))
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    alive = SpillFolder(tmp_path, most_bytes=MIB, fingerprint=MODEL)
    spilled = alive.write(b"mine")
    photos = spilled.path.parent.parent / "parked-photos"
    photos.mkdir()
    (photos / "holiday.jpg").write_text("somebody's own file")
    child = subprocess.Popen([sys.executable, "-c", _WRITES_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    assert len(_folders(tmp_path)) == 2
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert len(_folders(tmp_path)) == 2, "it could not clean up"
    SpillFolder(tmp_path, most_bytes=MIB, fingerprint=MODEL).close()
    assert _folders(tmp_path) == [spilled.path.parent]
    with alive.read(spilled) as state:
        assert bytes(state) == b"mine"
    alive.close()
    assert (photos / "holiday.jpg").exists()


def _folders(path: Path) -> list[Path]:
    return [p for p in path.rglob("parked-*") if (p / ".lock").exists()]


@pytest.mark.parametrize(
    ("device", "spared"),
    [("/dev/mmcblk0p2", True), ("/dev/sda1", False), ("/dev/mapper/root", True), ("overlay", True), ("host:/x", True)],
)
def test_what_wears_out_is_spared(device: str, spared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disks = tmp_path / "devices"
    for name in ("sda/sda1", "mmcblk0/mmcblk0p2", "dm-0/slaves"):
        (disks / name).mkdir(parents=True)
    (disks / "dm-0/slaves/mmcblk0p2").symlink_to(disks / "mmcblk0/mmcblk0p2")
    blocks = tmp_path / "block"
    blocks.mkdir()
    for name, disk in (("sda1", "sda/sda1"), ("mmcblk0p2", "mmcblk0/mmcblk0p2"), ("root", "dm-0")):
        (blocks / name).symlink_to(disks / disk)
    monkeypatch.setattr("kvpsi.kv.spill._mount_of", lambda _: ("ext4", device))
    assert is_spared(tmp_path, blocks) is spared
