"""Records of governed processes in a folder: who is alive, who is not, and what is no record."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvpsi.governor.peers import PeerFolder, Record, folder_named, open_peers
from kvpsi.governor.shares import Claim, ShareSettings
from kvpsi.governor.sharing import open_sharing

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there everybody is alone")
RECORD = Record(12.5, ("cgroup:/x", "system"), Claim(1, 2, 3, 4, 5, 2.0, -1), 77)
# keeps a record until it is ended
OTHER = """
import sys, time
from pathlib import Path
from kvpsi.governor.peers import PeerFolder, Record
from kvpsi.governor.shares import Claim
peers = PeerFolder(Path(sys.argv[1]))
peers.exchange(Record(1.0, ("system",), Claim(10, 10, 0, 20, 10), 0))
print("there", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        yield process
        process.kill()


def test_each_sees_the_others_and_nobody_is_left_behind(tmp_path: Path) -> None:
    one, two = PeerFolder(tmp_path), PeerFolder(tmp_path)
    assert one.exchange(RECORD) == ()
    (seen,) = two.exchange(replace(RECORD, returned_bytes=78))
    assert replace(seen, name="") == RECORD and seen.name
    assert [each.returned_bytes for each in one.exchange(RECORD)] == [78]
    two.close()
    two.close()
    assert one.exchange(RECORD) == () and two.exchange(RECORD) == ()
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_who_was_killed_is_gone_with_its_record(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    mine = PeerFolder(tmp_path)
    (seen,) = mine.exchange(RECORD)
    assert seen.claim.used_bytes == 10 and seen.name.startswith(f"{other.pid}-")
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert mine.exchange(RECORD) == ()
    assert len(list(tmp_path.iterdir())) == 1, "only its own is left"
    mine.close()


def test_what_is_being_written_is_taken_as_it_was_before(tmp_path: Path) -> None:
    one, two = PeerFolder(tmp_path), PeerFolder(tmp_path)
    two.exchange(RECORD)
    assert len(one.exchange(RECORD)) == 1
    (path,) = [path for path in tmp_path.iterdir() if path != one._path]
    whole = path.read_bytes()
    path.write_bytes(whole[:30] + b"9" + whole[31:])
    assert [replace(each, name="") for each in one.exchange(RECORD)] == [RECORD]
    one.close()
    two.close()


@pytest.mark.parametrize(
    "text",
    [b"", b"{}", b"\x00\xff", b'{"time_s": 1}\n00000000\n', b'{"claim": null}\n5d4b1a6b\n', b"a\nb\nc\nd"],
)
def test_what_is_no_record_counts_for_nothing(tmp_path: Path, text: bytes) -> None:
    one, two = PeerFolder(tmp_path), PeerFolder(tmp_path)
    two._path.write_bytes(text)
    assert one.exchange(RECORD) == ()
    one.close()
    two.close()


def test_numbers_that_cannot_be_are_no_record(tmp_path: Path) -> None:
    one, two = PeerFolder(tmp_path), PeerFolder(tmp_path)
    for wrong in (
        replace(RECORD, claim=replace(RECORD.claim, used_bytes=-1)),
        replace(RECORD, claim=replace(RECORD.claim, demand_bytes=1 << 70)),
        replace(RECORD, claim=replace(RECORD.claim, weight=0.0)),
        replace(RECORD, claim=replace(RECORD.claim, weight=float("inf"))),
        replace(RECORD, time_s=float("nan")),
    ):
        two.exchange(wrong)
        assert one.exchange(RECORD) == ()
    one.close()
    two.close()


def test_strange_files_disturb_nobody_and_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link.record").symlink_to(tmp_path / "notes.txt")
    (tmp_path / "folder.record").mkdir()
    os.mkfifo(tmp_path / "pipe.record")
    mine = PeerFolder(tmp_path)
    assert mine.exchange(RECORD) == ()
    mine.close()
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "link.record").is_symlink()


def test_a_folder_that_was_cleared_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    one, two = PeerFolder(folder), PeerFolder(folder)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert one.exchange(RECORD) == ()
    assert len(two.exchange(RECORD)) == 1 == len(one.exchange(RECORD))
    one.close()
    two.close()


def test_where_no_record_can_be_kept_it_is_alone_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert open_sharing(ShareSettings(folder=str(tmp_path / "file" / "records"))) is None
    assert len(caplog.records) == 1 and "--share-dir" in caplog.records[0].getMessage()
    assert open_sharing(ShareSettings(folder="none")) is None and len(caplog.records) == 1


def test_a_disk_that_is_full_has_it_alone_for_the_time_being(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = PeerFolder(tmp_path), PeerFolder(tmp_path)
    two.exchange(RECORD)
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert one.exchange(RECORD) == () == one.exchange(RECORD)
    assert len(caplog.records) == 1 and "No space left" in caplog.records[0].getMessage()
    assert len(one.exchange(RECORD)) == 1
    one.close()
    two.close()


def test_the_folder_is_the_users_own_unless_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder_named("/a", {"KVPSI_SHARE_DIR": "/b"}) == Path("/a")
    assert folder_named("", {"KVPSI_SHARE_DIR": "/b"}) == Path("/b")
    assert folder_named("none", {}) is None is folder_named("", {"KVPSI_SHARE_DIR": "none"})
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert folder_named("", {"XDG_RUNTIME_DIR": "/x"}) == Path("/run/kvpsi")
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert folder_named("", {"XDG_RUNTIME_DIR": "/x"}) == Path("/x/kvpsi")
    assert folder_named("", {}).name == "kvpsi-1000"  # type: ignore[union-attr]
    assert open_peers(None) is None


def test_what_was_killed_while_it_began_is_removed(tmp_path: Path) -> None:
    stale, fresh = tmp_path / ".new-stale", tmp_path / ".new-fresh"
    stale.touch()
    fresh.touch()
    os.utime(stale, (1.0, 1.0))
    PeerFolder(tmp_path).close()
    assert list(tmp_path.iterdir()) == [fresh]
