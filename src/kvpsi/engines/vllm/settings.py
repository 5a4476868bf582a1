"""What the user asked for, from the environment: in vLLM's processes there is no command line of kvpsi."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvpsi import units
from kvpsi.errors import UsageError
from kvpsi.governor import LawSettings


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """The variables have the names that `kvpsi serve` knows.

    Attributes:
        law: constants of the control law (``KVPSI_RESERVE``, ``KVPSI_REGROW_ABOVE``).
        cache_limit: most of the cache to use, a share (``KVPSI_CACHE_LIMIT``).
        log: where decisions are written as JSON lines (``KVPSI_LOG``).
        status_port: where status and metrics can be read on this machine (``KVPSI_STATUS_PORT``); 0: nowhere.
    """

    law: LawSettings = field(default_factory=LawSettings)
    cache_limit: float = 1.0
    log: Path | None = None
    status_port: int = 0


def settings_from(environ: Mapping[str, str] = os.environ) -> VllmSettings:
    """Read them.

    Raises:
        UsageError: a variable is not what it must be; the sentence names it.
    """
    low_bytes, high_bytes = _size_or_auto(environ, "KVPSI_RESERVE"), _size_or_auto(environ, "KVPSI_REGROW_ABOVE")
    if low_bytes is not None and high_bytes is not None and high_bytes < low_bytes:
        raise UsageError("KVPSI_REGROW_ABOVE is below KVPSI_RESERVE, so blocks would come and go at once; raise it.")
    log = environ.get("KVPSI_LOG")
    return VllmSettings(
        law=LawSettings(low_bytes=low_bytes, high_bytes=high_bytes),
        cache_limit=_share(environ.get("KVPSI_CACHE_LIMIT", "100%")),
        log=Path(log) if log else None,
        status_port=_port(environ.get("KVPSI_STATUS_PORT", "0")),
    )


def _size_or_auto(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "auto")
    try:
        return None if text == "auto" else units.parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"{name}: {error} Or leave it at auto.") from error


def _share(text: str) -> float:
    try:
        return units.parse_share(text)
    except UsageError as error:
        raise UsageError(f"KVPSI_CACHE_LIMIT: {error}") from error


def _port(text: str) -> int:
    if text.isdecimal() and int(text) < 1 << 16:
        return int(text)
    raise UsageError(f"KVPSI_STATUS_PORT is {text}, which is not a port; give a number below 65536, or 0 for none.")
