"""Which file wakes the monitor."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpsi.pressure import open_best_trigger


def test_service_manager_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEMORY_PRESSURE_WATCH", "/dev/null")
    trigger, reason = open_best_trigger(tmp_path)
    assert trigger is None
    assert "switched memory pressure off" in reason


def test_without_any_file_the_reason_names_the_system_wide_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MEMORY_PRESSURE_WATCH", raising=False)
    trigger, reason = open_best_trigger(tmp_path / "own", root=tmp_path)
    assert trigger is None
    assert str(tmp_path / "proc/pressure/memory") in reason


@pytest.mark.skipif(not Path("/proc/pressure/memory").exists(), reason="NO PSI HERE: boot with psi=1")
def test_falls_back_to_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MEMORY_PRESSURE_WATCH", raising=False)
    trigger, sentence = open_best_trigger(tmp_path / "vanished")
    assert trigger is not None, sentence
    with trigger:
        assert trigger.path == Path("/proc/pressure/memory")
