"""How much CPU this process may really use: affinity and cgroup quota."""

from __future__ import annotations

import math
import os
from pathlib import Path

from kvpsi.doctor.finding import Finding
from kvpsi.pressure.cpu import allowed_cpus, cpu_quota


def processors(root: Path) -> list[Finding]:
    """CPUs by affinity, and a cgroup's quota where there is one."""
    n_total = os.cpu_count() or 1
    n_allowed = len(allowed_cpus())
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
