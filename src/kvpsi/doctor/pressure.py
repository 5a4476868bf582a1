"""What the kernel says about pressure and memory here."""

from __future__ import annotations

from pathlib import Path

from kvpsi.doctor.finding import Finding
from kvpsi.errors import KvpsiError

_MEMORY_PRESSURE = "proc/pressure/memory"


def readings(root: Path) -> list[Finding]:
    """One reading of the source that governing would use, and how that source describes itself."""
    from kvpsi.pressure import open_source

    try:
        source = open_source(root=root)
        try:
            reading = source.read()
            described = source.describe()
        finally:
            source.close()
    except KvpsiError as error:
        return [Finding("memory readings", "fail", str(error), "Run kvpsi on Linux with /proc mounted.")]
    return [
        _psi(root, reading.synthetic),
        *(Finding("seen", "warn" if line in reading.problems else "ok", line) for line in described),
    ]


def _psi(root: Path, synthetic: bool) -> Finding:
    if not synthetic:
        return Finding("pressure stall information", "ok", "present and readable")
    fix = "Boot Linux 4.20 or newer with `psi=1` on the kernel's command line."
    if (root / _MEMORY_PRESSURE).exists():
        fix = "Boot with `psi=1` on the kernel's command line, or make /proc/pressure readable."
    return Finding("pressure stall information", "warn", "absent: kvpsi estimates stalls from headroom and swap", fix)


def triggers(root: Path) -> Finding:
    """Whether the kernel would wake a governor up, looked for as governing does; it is disarmed again at once."""
    from kvpsi.pressure import open_best_trigger
    from kvpsi.pressure.locate import locate_cgroups

    own = locate_cgroups(root).pressure
    trigger, sentence = open_best_trigger(own.path if own else None, root)
    if trigger is None:
        fix = "Nothing to do: kvpsi polls instead, which costs little."
        return Finding("pressure triggers", "warn", sentence, fix)
    with trigger:
        return Finding("pressure triggers", "ok", sentence)
