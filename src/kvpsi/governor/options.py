"""The law's settings as people type them: options of the commands, and variables of the plugin for vLLM."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from kvpsi import units
from kvpsi.errors import UsageError
from kvpsi.governor.adapt import AdaptSettings
from kvpsi.governor.guards import GuardSettings
from kvpsi.governor.law import LawSettings


def law_settings(
    reserve: str, regrow_above: str, forget_rate: str = "auto", forget_burst: str = "auto", law: str = ""
) -> LawSettings:
    """What --reserve, --regrow-above, --forget-rate, --forget-burst and --law ask for."""
    low_bytes, high_bytes = _size_or_auto("--reserve", reserve), _size_or_auto("--regrow-above", regrow_above)
    if low_bytes is not None and high_bytes is not None and high_bytes < low_bytes:
        raise UsageError(
            f"--regrow-above {regrow_above} is below --reserve {reserve}, so the cache would grow and shrink at once; "
            "raise --regrow-above, or lower --reserve."
        )
    rate_bytes = 0 if forget_rate.strip() == "0" else _size_or_auto("--forget-rate", forget_rate)
    burst_bytes = 0 if rate_bytes == 0 else _size_or_auto("--forget-burst", forget_burst)
    guards = GuardSettings(forget_bytes_per_min=rate_bytes, forget_burst_bytes=burst_bytes)
    return LawSettings(low_bytes=low_bytes, high_bytes=high_bytes, guards=guards, **_constants(law))


def adapt_settings(adapt: bool, law: str) -> AdaptSettings | None:
    """What --adapt asks for; what --law names stays as it is."""
    return AdaptSettings(fixed=tuple(_constants(law))) if adapt else None


def _constants(law: str) -> dict[str, Any]:
    """What --law asks for: names and numbers."""
    known = {field.name: type(field.default) for field in fields(LawSettings) if isinstance(field.default, int | float)}
    found: dict[str, Any] = {}
    for each in (part.strip() for part in law.split(",") if part.strip()):
        name, _, number = each.partition("=")
        try:
            found[name.strip()] = known[name.strip()](number)
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"--law {each} is none of {', '.join(known)} with a number; give it as grow_share=0.1, and "
                "commas between several."
            ) from error
    return found


def _size_or_auto(option: str, text: str) -> int | None:
    try:
        return None if text == "auto" else units.parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"{option}: {error} Or leave it at auto.") from error
