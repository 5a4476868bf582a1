"""What a board may leave behind."""

from __future__ import annotations

from pathlib import Path

from kvpsi.board import BoardPlaces


def left_behind(places: BoardPlaces, maker_pid: int) -> list[Path]:
    """Cgroups of one maker; others may have boards of their own."""
    return [folder for place in places.all for folder in place.path.glob(f"kvpsi-board-{maker_pid}-*")]
