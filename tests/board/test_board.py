"""Real boards: limits hold, what runs there is counted, and nothing is left whatever happens to their maker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from kvpsi.bench.conversation import forget_cached_pages
from kvpsi.board import Board, BoardPlaces, BoardSettings, find_places, open_board
from kvpsi.board.board import SwapKind
from kvpsi.board.cgroups import BoardCgroups
from kvpsi.board.places import MEMORY_LIMIT_FILE, Place
from kvpsi.errors import EnvironmentProblem, UsageError
from kvpsi.hog import Hog, HogReport, HogSettings
from support.boards import left_behind
from support.interrupts import popen_heeding_ctrl_c

MIB = 1 << 20
SMALL = BoardSettings(128 * MIB)


def play(board: Board, settings: HogSettings, group: str = "hog") -> HogReport:
    return Hog(settings, lambda command: board.start(command, group=group, stdout=subprocess.PIPE)).wait()


def swap_devices() -> list[str]:
    return [line.split()[0] for line in Path("/proc/swaps").read_text().splitlines()[1:]]


def wait_until(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.pressure
def test_what_fits_lives_and_what_does_not_is_killed(board_places: BoardPlaces) -> None:
    with open_board(SMALL) as board:
        fits = play(board, HogSettings(60 * MIB, rate_bytes_s=400 * MIB, hold_s=0.5), "small")
        assert fits.completed and fits.killed_by is None and fits.peak_bytes == 60 * MIB
        assert board.figures().kills == 0
        too_large = play(board, HogSettings(300 * MIB, rate_bytes_s=400 * MIB, hold_s=0.5), "large")
        assert too_large.killed_by == "SIGKILL" and not too_large.completed
        assert 0 < too_large.peak_bytes <= 128 * MIB
        assert (board.cgroups.kills("small"), board.cgroups.kills("large")) == (0, 1)
        figures = board.figures()
        assert figures.kills == 1
        assert figures.peak_bytes is not None and 60 * MIB < figures.peak_bytes <= 128 * MIB
    assert not left_behind(board_places, os.getpid())


@pytest.mark.pressure
def test_with_zram_it_stalls_instead_and_the_device_is_gone_afterwards(board_places: BoardPlaces) -> None:
    before = swap_devices()
    try:
        with open_board(BoardSettings(128 * MIB, swap="zram")) as board:
            assert len(swap_devices()) == len(before) + 1
            report = play(board, HogSettings(150 * MIB, rate_bytes_s=200 * MIB, hold_s=1))
            assert report.completed and report.killed_by is None
            stall_s = board.stall_s("hog")
            assert stall_s is not None and stall_s > 0
    except EnvironmentProblem as error:
        pytest.skip(f"NO ZRAM HERE: {error}")
    assert swap_devices() == before and not left_behind(board_places, os.getpid())


@pytest.mark.pressure
def test_what_zram_takes_is_taken_off_the_boards_memory() -> None:
    try:
        with open_board(BoardSettings(128 * MIB, swap="zram")) as board:
            limit_file = board.cgroups.memory / MEMORY_LIMIT_FILE[board.cgroups.places.memory.version]
            assert int(limit_file.read_text()) > 127 * MIB  # the empty device takes a little
            settings = HogSettings(150 * MIB, rate_bytes_s=200 * MIB, hold_s=60)
            hog = Hog(settings, lambda command: board.start(command, group="hog", stdout=subprocess.PIPE))
            # 22 MiB at least have to go, and half of each page of a hog is random.
            assert wait_until(lambda: int(limit_file.read_text()) < 118 * MIB)
            hog.end()
            assert hog.wait().killed_by is None
            assert wait_until(lambda: int(limit_file.read_text()) > 124 * MIB)
            # Half of this is more than the board has: it cannot fit however slowly it grows.
            too_large = play(board, HogSettings(300 * MIB, rate_bytes_s=200 * MIB, hold_s=60), "large")
            assert too_large.killed_by == "SIGKILL"
    except EnvironmentProblem as error:
        pytest.skip(f"NO ZRAM HERE: {error}")


@pytest.mark.pressure
def test_what_has_to_be_read_again_is_counted(board_places: BoardPlaces, default_model: Path) -> None:
    with open_board(BoardSettings(64 * MIB)) as board:
        forget_cached_pages(default_model)
        for _ in range(3):
            command = ["cat", str(default_model)]  # larger than the board
            assert board.start(command, group="reader", stdout=subprocess.DEVNULL).wait() == 0
        assert board.cgroups.refaults() >= board.cgroups.refaults("reader") > 1000
    assert not left_behind(board_places, os.getpid())


@pytest.mark.pressure
def test_processors_are_limited(board_places: BoardPlaces) -> None:
    if board_places.cpu is None:
        pytest.skip("NO CPU CONTROLLER HERE")
    spin = "import time\nt = time.monotonic()\nwhile time.monotonic() < t + 2: pass\nprint(time.process_time())"
    with open_board(BoardSettings(128 * MIB, cpus=0.25)) as board:
        process = board.start([sys.executable, "-c", spin], stdout=subprocess.PIPE)
        used_s = float(process.communicate(timeout=60)[0])
    assert used_s < 1.0, "a quarter of 2 s, and a period more"


@pytest.mark.pressure
@pytest.mark.parametrize("swap", ["none", "zram"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_nothing_is_left_when_its_maker_ends(board_places: BoardPlaces, number: signal.Signals, swap: SwapKind) -> None:
    before = swap_devices()
    try:
        with open_board(BoardSettings(64 * MIB, swap)):
            pass
    except EnvironmentProblem as error:
        pytest.skip(f"NO ZRAM HERE: {error}")
    maker = popen_heeding_ctrl_c(
        [sys.executable, "-m", "kvpsi", "board", "run", "--memory", "64M", "--swap", swap, "--", "sleep", "600"],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert wait_until(lambda: bool(sleepers(board_places, maker.pid))), "it never started"
        (sleeper,) = sleepers(board_places, maker.pid)
        if number == signal.SIGINT:
            os.killpg(maker.pid, number)  # as a terminal does
        else:
            maker.send_signal(number)
        maker.wait(30)
        assert wait_until(lambda: not left_behind(board_places, maker.pid) and swap_devices() == before), (
            "cgroups or swap are left"
        )
        assert not psutil.pid_exists(sleeper) or psutil.Process(sleeper).status() == psutil.STATUS_ZOMBIE
    finally:
        maker.kill()
        maker.wait()


def sleepers(places: BoardPlaces, maker_pid: int) -> list[int]:
    found = places.memory.path.glob(f"kvpsi-board-{maker_pid}-*/main/cgroup.procs")
    pids = [int(pid) for file in found for pid in file.read_text().split()]
    return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() == "sleep"]


def test_a_command_that_does_not_exist_is_told_in_a_sentence() -> None:
    command = [sys.executable, "-m", "kvpsi", "board", "run", "--", "no-such-command"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("kvpsi: There is no command no-such-command")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "wrong", [{"memory_bytes": 1000}, {"memory_bytes": 1 << 30, "swap": "disk"}, {"memory_bytes": 1 << 30, "cpus": 0.0}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        BoardSettings(**wrong)  # type: ignore[arg-type]


# -- pure version 2, on directories made up to look like it ----------------------------------------------------------


@pytest.fixture
def version_2(tmp_path: Path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user.slice/session.scope\n")
    own = tmp_path / "sys/fs/cgroup/user.slice/session.scope"
    own.mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cgroup.procs").write_text("")
    return tmp_path


def test_a_directory_that_takes_no_limit_is_no_place_for_a_board(version_2: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"no limit can be set .* run as root"):
        find_places(version_2)
    assert not list(version_2.rglob("kvpsi-*")), "nothing is left of the attempt"


def test_limits_are_written_as_version_2_wants_them(tmp_path: Path) -> None:
    place = Place(tmp_path, 2)
    cgroups = BoardCgroups(BoardPlaces(place, place, place), "board")
    made = Path.mkdir

    def mkdir(self: Path, *args: object, **kwargs: object) -> None:
        made(self, *args, **kwargs)  # type: ignore[arg-type]
        for name in ("memory.max", "memory.swap.max", "cpu.max", "cgroup.subtree_control"):
            (self / name).write_text("")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "mkdir", mkdir)
        cgroups.make(600 * MIB, swap="none", cpus=0.5)
    found = {file.name: file.read_text() for file in cgroups.memory.iterdir()}
    assert found == {
        "memory.max": "629145600",
        "memory.swap.max": "0",
        "cpu.max": "50000 100000",
        "cgroup.subtree_control": "+memory",
    }
