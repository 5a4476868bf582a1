"""Options that several commands have, as settings."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from kvpsi import units
from kvpsi.errors import UsageError

if TYPE_CHECKING:
    from kvpsi.governor import AdaptSettings, LawSettings
    from kvpsi.kv import CacheSettings


def levels_in(text: str, example: str) -> tuple[int, ...]:
    """What --levels asks for."""
    try:
        return tuple(int(level) for level in text.split(","))
    except ValueError as error:
        raise UsageError(f"--levels {text} is not a list of numbers; give them as {example}.") from error


def cache_settings(keep: int, tail: int, turn: int, min_prune: int) -> CacheSettings:
    """What --keep, --tail, --turn and --min-prune ask for."""
    from kvpsi.kv import CacheSettings

    asked = (("--keep", keep, 0), ("--tail", tail, 0), ("--turn", turn, 0), ("--min-prune", min_prune, 1))
    for option, n_tokens, least in asked:
        if n_tokens < least:
            raise UsageError(f"{option} is {n_tokens} tokens, which cannot be; give {least} or more.")
    return CacheSettings(keep=keep, tail=tail, turn=turn, min_prune=min_prune)


def remark_on_protection(cache: CacheSettings, n_cells: int) -> str | None:
    """A sentence if --keep and --tail leave nothing that could be forgotten."""
    if cache.keep + cache.tail < n_cells:
        return None
    return (
        f"nothing can be forgotten: --keep {cache.keep} and --tail {cache.tail} protect all {n_cells} tokens of the "
        "context; lower them so that memory in use can be given back"
    )


def law_settings(
    reserve: str, regrow_above: str, forget_rate: str = "auto", forget_burst: str = "auto", law: str = ""
) -> LawSettings:
    """What --reserve, --regrow-above, --forget-rate, --forget-burst and --law ask for."""
    from kvpsi.governor import GuardSettings, LawSettings

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
    from kvpsi.governor import AdaptSettings

    return AdaptSettings(fixed=tuple(_constants(law))) if adapt else None


def _constants(law: str) -> dict[str, Any]:
    """What --law asks for: names and numbers."""
    from kvpsi.governor import LawSettings

    known = {field.name: type(field.default) for field in fields(LawSettings) if isinstance(field.default, int | float)}
    found: dict[str, Any] = {}
    for each in (part.strip() for part in law.split(",") if part.strip()):
        name, _, number = each.partition("=")
        try:
            found[name.strip()] = known[name.strip()](number)
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"--law {each} is none of {', '.join(known)} with a number; give it as grow_share=0.1."
            ) from error
    return found


def _size_or_auto(option: str, text: str) -> int | None:
    try:
        return None if text == "auto" else units.parse_bytes(text)
    except UsageError as error:
        raise UsageError(f"{option}: {error} Or leave it at auto.") from error
