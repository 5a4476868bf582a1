"""The pressure bench: its arithmetic on made-up runs, and small real runs on a real board."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpsi.bench.figures import quantile
from kvpsi.bench.pressure.plan import Plan
from kvpsi.bench.pressure.play import Reading, Run, Token
from kvpsi.bench.pressure.report import figures_of, markdown, row_of, write_files
from kvpsi.bench.pressure.watch import Sample
from kvpsi.bench.pressure.weights import mapped
from kvpsi.board import BoardPlaces
from kvpsi.errors import UsageError
from kvpsi.hog import HogReport
from kvpsi.kv.pages import populate, resident_bytes
from support.boards import left_behind
from support.interrupts import popen_heeding_ctrl_c

MIB = 1 << 20


def sample(time_s: float, *, rss_mib: int = 100, hog_stall_s: float = 0.0) -> Sample:
    return Sample(time_s, 300 * MIB, rss_mib * MIB, 50 * MIB, 0, hog_stall_s, 0.0, hog_stall_s, 0)


def made_up(variant: Any, step_ms: float, *, rss_mib: int, stall: float = 0.0, worst_ms: float = 0.0) -> Run:
    """A run of 100 tokens in ten seconds, the last of which gave memory and took ``worst_ms``."""
    tokens = [Token(1 + i / 10, step_ms / 1000, False, 500) for i in range(99)]
    tokens.append(Token(11, (worst_ms or step_ms) / 1000, True, 400))
    samples = [
        sample(0, rss_mib=900),
        sample(1, rss_mib=rss_mib),
        sample(11, rss_mib=rss_mib - 40, hog_stall_s=10 * stall),
    ]
    hog = None if variant == "calm" else HogReport(True, None, 10, 100 * MIB, 0.001, 10 * stall)
    return Run(variant, 0, [], tokens, samples, 1.0, {"prunes": 3, "major_faults": 7}, hog)


def test_figures_are_ratios_to_the_other_variants() -> None:
    runs = [
        made_up("calm", 30, rss_mib=250),
        made_up("fixed", 90, rss_mib=500, stall=0.5),
        made_up("kvpsi", 33, rss_mib=250, stall=0.05, worst_ms=75),
    ]
    found = {f.name: f for f in figures_of(runs)}
    assert found["peak_rss_saved"].value == pytest.approx(0.5) and found["peak_rss_saved"].met
    assert found["hog_stall_to_fixed"].value == pytest.approx(0.1) and found["hog_stall_to_fixed"].met
    assert found["p50_to_calm"].value == pytest.approx(1.1) and found["p50_to_calm"].met is False
    assert found["worst_giving_step"].value == pytest.approx(75) and found["worst_giving_step"].met
    assert found["worst_step_to_calm"].value == pytest.approx(2.5)
    assert found["tok_s_to_calm"].value == pytest.approx(100 * 30 / (99 * 33 + 75))
    assert found["kvpsi.kills"].met and "hog_stall_to_prune" not in found and "reading_to_alone" not in found


def test_reading_is_compared_with_the_same_cache_alone() -> None:
    run = made_up("kvpsi", 33, rss_mib=250)
    run.reading_pressed, run.reading_alone = Reading(6.0, 2), Reading(4.0, 0)
    found = {f.name: f for f in figures_of([run])}
    assert found["reading_to_alone"].value == pytest.approx(1.5) and found["reading_to_alone"].met is False
    assert found["reading_interrupts"].value == 2


def test_tokens_are_compared_with_those_of_as_small_a_cache_alone() -> None:
    run = made_up("kvpsi", 33, rss_mib=250, worst_ms=400)
    run.pressed += [Token(0.5, 0.099, False, 900)] * 200  # before the cache had shrunk: not compared
    run.pressed += [Token(0.5, 0.001, False, 300)] * 200  # nor are those of a smaller one
    run.alone = [Token(20 + i / 10, 0.030, False, 480) for i in range(99)] + [Token(30, 0.5, True, 470)]
    found = {f.name: f for f in figures_of([run])}
    assert found["p50_to_alone"].value == pytest.approx(1.1) and found["p50_to_alone"].met is False
    assert found["p99_to_alone"].value == pytest.approx(1.1)
    assert found["tokens_compared_with_alone"].value == 99
    assert "p50_to_alone" not in {f.name for f in figures_of([made_up("kvpsi", 33, rss_mib=250)])}


def test_other_ways_with_the_weights_are_compared_without_a_target() -> None:
    runs = [made_up("calm", 30, rss_mib=250), made_up("kvpsi-locked", 60, rss_mib=250)]
    found = {f.name: f for f in figures_of(runs)}
    assert "kvpsi-locked.p50_to_calm" not in found, "kvpsi itself was not run"
    found = {f.name: f for f in figures_of([*runs, made_up("kvpsi", 30, rss_mib=250)])}
    assert found["kvpsi-locked.p50_to_calm"].value == pytest.approx(2)
    assert found["kvpsi-locked.p50_to_calm"].met is None and found["p50_to_calm"].met


def test_a_killed_model_is_a_row_and_counts(tmp_path: Path) -> None:
    dead = Run("fixed", 1, samples=[sample(0)], hog=HogReport(False, "SIGKILL", 1, 0, None, None), kills=2)
    row = row_of(dead)
    assert row.model_killed and row.hog_killed and row.tokens == 0
    assert "model and neighbour" in markdown([row])
    assert {f.name: f.value for f in figures_of([dead])} == {"fixed.kills": 2.0}
    document = write_files(tmp_path, Plan(Path("m.gguf")), [dead], interrupted=True, problems=["a problem"])
    assert all(Path(path).stat().st_size for path in document["raw"])
    assert document["problems"] == ["a problem"]
    assert json.loads((tmp_path / "result.json").read_text())["interrupted"] is True


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0.01, 1))
def test_a_quantile_is_one_of_the_values_and_splits_them(values: list[float], share: float) -> None:
    found = quantile(values, share)
    assert found in values
    assert sum(v <= found for v in values) >= share * len(values) - 1e-9
    assert sum(v < found for v in values) <= share * len(values)


@pytest.mark.parametrize(
    "wrong",
    [
        {"variants": ()},
        {"variants": ("kvpsi", "magic")},
        {"variants": ("kvpsi", "kvpsi")},
        {"n_ctx": 1000},
        {"rounds": 0},
        {"prune_threshold": 2.0},
    ],
)
def test_plans_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Plan(Path("m.gguf"), **wrong)


def test_mapped_weights_are_found_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"w" * (4 * mmap.PAGESIZE))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as area:
        (found,) = mapped(file)
        assert found.n_bytes == 4 * mmap.PAGESIZE
        populate([found])
        assert resident_bytes([found])[0] == found.n_bytes
        assert area[:1] == b"w"
    assert mapped(file) == []


SMALL = ["--prompt-tokens", "64", "-n", "24", "-c", "2048", "--rounds", "1", "--variant-cooldown-s", "0"]
SMALL += ["--read-tokens", "128", "--calm-tokens", "24"]
BENCH = [sys.executable, "-m", "kvpsi", "bench", "pressure", *SMALL]


@pytest.mark.engine
@pytest.mark.pressure
@pytest.mark.usefixtures("board_places")
def test_a_small_bench_on_a_real_board(default_model: Path, tmp_path: Path) -> None:
    command = [*BENCH, "-m", str(default_model), "--pressure-mib", "40", "--pressure-warmup-s", "0", "--json"]
    command += ["--variant-order", "calm,fixed,prune,kvpsi", "--swap", "none", "--out-dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [r["variant"] for r in document["runs"]] == ["calm", "fixed", "prune", "kvpsi"]
    found = {f["name"]: f["value"] for f in document["figures"]}
    assert found["reading_to_alone"] > 0
    stretches = [line.split(",")[:3] for line in (tmp_path / "out" / "tokens.csv").read_text().splitlines()]
    assert stretches.count(["kvpsi", "1", "alone"]) == 24
    assert all(r["tokens"] == 24 and not r["model_killed"] and r["peak_rss_mib"] > 100 for r in document["runs"])
    assert document["interrupted"] is False and document["problems"] == []
    assert {Path(path).name for path in document["raw"]} >= {"runs.csv", "table.md", "kvpsi.png"}


@pytest.mark.engine
@pytest.mark.pressure
def test_ctrl_c_ends_it_with_what_there_is_and_leaves_nothing(
    board_places: BoardPlaces, default_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [*BENCH, "-m", str(default_model), "--swap", "none", "--out-dir", str(out), "--json", "-n", "300"]
    command += ["--variant-order", "calm,kvpsi", "--pressure-mib", "20"]
    process = popen_heeding_ctrl_c(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "result.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    document = json.loads(stdout)
    assert document["interrupted"] is True and [r["variant"] for r in document["runs"]] == ["calm"]
    assert not left_behind(board_places, process.pid)


@pytest.mark.engine
@pytest.mark.pressure
def test_a_model_that_is_killed_and_a_full_disk_are_told(
    board_places: BoardPlaces, default_model: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    command = [*BENCH, "-m", str(default_model), "--swap", "none", "--out-dir", str(full), "--json", "-n", "400"]
    command += ["--variant-order", "calm,kvpsi", "--pressure-mib", "20"]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "kvpsi-test", str(full)], check=True)
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            subject_of(process, "calm").kill()
            stdout, stderr = process.communicate(timeout=200)
        finally:
            process.kill()
    finally:
        subprocess.run(["umount", str(full)], check=True)
    assert process.returncode == 0 and "Traceback" not in stderr, stderr
    document = json.loads(stdout)
    assert [r["model_killed"] for r in document["runs"]] == [True, False]
    assert any("No space left" in problem for problem in document["problems"])
    assert not left_behind(board_places, process.pid)


def subject_of(bench: subprocess.Popen[str], variant: str) -> psutil.Process:
    """The process of a variant's model, as soon as there is one."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(bench.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if child.cmdline()[2:4] == ["kvpsi.bench.pressure.subject", variant]:
                    return child
        time.sleep(0.05)
    raise AssertionError(f"the model of {variant} never started")
