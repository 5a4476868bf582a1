"""What the user asked for, from the environment: in vLLM's processes there is no command line of kvpsi."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvpsi import units
from kvpsi.cli.settings import adapt_settings, law_settings
from kvpsi.errors import UsageError
from kvpsi.governor import AdaptSettings, LawSettings
from kvpsi.governor.shares import ShareSettings


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """Most variables have the names that `kvpsi serve` knows.

    Attributes:
        law: constants of the control law (``KVPSI_RESERVE``, ``KVPSI_REGROW_ABOVE``, ``KVPSI_LAW``).
        adapt: whether they follow what the machine shows (``KVPSI_ADAPT=1``); None: they stay as they are.
        share: its part of memory beside other governed models (``KVPSI_SHARE_WEIGHT``, ``KVPSI_SHARE_PRIORITY``,
            ``KVPSI_SHARE_DIR``).
        cache_limit: most of the cache to use, a share (``KVPSI_CACHE_LIMIT``).
        log: where decisions are written as JSON lines (``KVPSI_LOG``).
        status_port: where status and metrics can be read on this machine (``KVPSI_STATUS_PORT``); 0: nowhere.
    """

    law: LawSettings = field(default_factory=LawSettings)
    adapt: AdaptSettings | None = None
    share: ShareSettings = field(default_factory=ShareSettings)
    cache_limit: float = 1.0
    log: Path | None = None
    status_port: int = 0


def settings_from(environ: Mapping[str, str] = os.environ) -> VllmSettings:
    """Read them.

    Raises:
        UsageError: a variable is not what it must be; the sentence names it.
    """
    law, log = environ.get("KVPSI_LAW", ""), environ.get("KVPSI_LOG")
    try:
        constants = law_settings(
            environ.get("KVPSI_RESERVE", "auto"), environ.get("KVPSI_REGROW_ABOVE", "auto"), law=law
        )
        adapt = adapt_settings(is_yes(environ.get("KVPSI_ADAPT", "")), law)
    except UsageError as error:
        raise UsageError(f"In KVPSI_RESERVE, KVPSI_REGROW_ABOVE or KVPSI_LAW, {error}") from error
    return VllmSettings(
        law=constants,
        adapt=adapt,
        share=_beside_others(environ),
        cache_limit=_share(environ.get("KVPSI_CACHE_LIMIT", "100%")),
        log=Path(log) if log else None,
        status_port=_port(environ.get("KVPSI_STATUS_PORT", "0")),
    )


def is_yes(text: str) -> bool:
    """Whether a variable says so, in one of the words that command lines take."""
    return text.strip().lower() in ("1", "true", "t", "yes", "y", "on")


def _beside_others(environ: Mapping[str, str]) -> ShareSettings:
    weight, priority = environ.get("KVPSI_SHARE_WEIGHT", "1"), environ.get("KVPSI_SHARE_PRIORITY", "0")
    try:
        return ShareSettings(float(weight), int(priority), folder=environ.get("KVPSI_SHARE_DIR", ""))
    except ValueError as error:
        raise UsageError(
            f"KVPSI_SHARE_WEIGHT is {weight} and KVPSI_SHARE_PRIORITY {priority}; give a number and a whole number."
        ) from error


def _share(text: str) -> float:
    try:
        return units.parse_share(text)
    except UsageError as error:
        raise UsageError(f"KVPSI_CACHE_LIMIT: {error}") from error


def _port(text: str) -> int:
    if text.isdecimal() and int(text) < 1 << 16:
        return int(text)
    raise UsageError(f"KVPSI_STATUS_PORT is {text}, which is not a port; give a number below 65536, or 0 for none.")
