"""How much CPU this process may really use: affinity and cgroup quota."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath

from kvpsi.doctor.finding import Finding

_V2_MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
_V1_MOUNTS = ("sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/cpu")


def processors(root: Path) -> list[Finding]:
    """CPUs by affinity, and a cgroup's quota where there is one."""
    n_total = os.cpu_count() or 1
    n_allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_total
    findings = [Finding("CPU affinity", "ok", f"{n_allowed} of {n_total} CPUs")]
    quota = cpu_quota(root)
    if quota is None:
        findings.append(Finding("CPU quota", "ok", "none"))
    elif quota >= n_allowed:
        findings.append(Finding("CPU quota", "ok", f"{quota:.2f} CPUs"))
    else:
        findings.append(
            Finding(
                "CPU quota",
                "warn",
                f"{quota:.2f} CPUs, but {n_allowed} are visible: too many threads would spin it away",
                f"Use at most {max(1, math.floor(quota))} thread(s).",
            )
        )
    return findings


def cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time that the tightest cgroup above this process allows; None without a quota."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            mounts, read = _V2_MOUNTS, _quota_v2
        elif "cpu" in controllers.split(","):
            mounts, read = _V1_MOUNTS, _quota_v1
        else:
            continue
        parts = PurePosixPath(path.lstrip("/")).parts
        for mount in mounts:
            folders = [(root / mount).joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
            quotas += [quota for folder in folders if (quota := read(folder)) is not None]
    return min(quotas, default=None)


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number: no quota
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        period_us = int((folder / "cpu.cfs_period_us").read_text())
        return quota_us / period_us if quota_us > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
