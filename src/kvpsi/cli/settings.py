"""Options that several commands have, as settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvpsi.errors import UsageError

if TYPE_CHECKING:
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
