"""What the user asked for, from the environment: in vLLM's processes there is no command line of kvpsi."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from kvpsi import units
from kvpsi.errors import UsageError
from kvpsi.governor import AdaptSettings, LawSettings
from kvpsi.governor.options import adapt_settings, law_settings
from kvpsi.governor.shares import ShareSettings

_KNOWN = re.compile(
    "KVPSI_(VLLM|RESERVE|REGROW_ABOVE|LAW|ADAPT|SHARE_(WEIGHT|PRIORITY|DIR)|CACHE_LIMIT|LOG|STATUS_PORT"
    "|CACHE_DIR|DEBUG|(REQUIRE|TEST)_.*)"  # other parts of kvpsi, and its tests
)
Number = TypeVar("Number", int, float)
_YES, _NO = ("1", "true", "t", "yes", "y", "on"), ("", "0", "false", "f", "no", "n", "off")


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
        unknown: variables that look like kvpsi's and mean nothing here.
    """

    law: LawSettings = field(default_factory=LawSettings)
    adapt: AdaptSettings | None = None
    share: ShareSettings = field(default_factory=ShareSettings)
    cache_limit: float = 1.0
    log: Path | None = None
    status_port: int = 0
    unknown: tuple[str, ...] = ()


def settings_from(environ: Mapping[str, str] = os.environ) -> VllmSettings:
    """Read them.

    Raises:
        UsageError: a variable is not what it must be; the sentence names it.
    """
    environ = {name: text for name, text in environ.items() if text.strip()}
    law = environ.get("KVPSI_LAW", "")
    try:
        constants = law_settings(
            environ.get("KVPSI_RESERVE", "auto"), environ.get("KVPSI_REGROW_ABOVE", "auto"), law=law
        )
    except UsageError as error:
        raise UsageError(_with_variables(str(error))) from error
    return VllmSettings(
        law=constants,
        adapt=adapt_settings(_is_yes("KVPSI_ADAPT", environ), law),
        share=_beside_others(environ),
        cache_limit=_share(environ.get("KVPSI_CACHE_LIMIT", "100%")),
        log=_log(environ.get("KVPSI_LOG")),
        status_port=_port(environ.get("KVPSI_STATUS_PORT", "0")),
        unknown=tuple(sorted(name for name in environ if name.startswith("KVPSI_") and not _KNOWN.fullmatch(name))),
    )


def refuse_port(status_port: int, arguments: Sequence[str], n_engines: int = 1) -> None:
    """Raise UsageError if vLLM's own port on its command line is that of an engine's status: both would take it, and
    vLLM not answer."""
    named = [after for option, after in pairwise(arguments) if option == "--port"]
    named += [option.partition("=")[2] for option in arguments if option.startswith("--port=")]
    own = named[-1] if named else "8000"
    if status_port and own in map(str, range(status_port, status_port + n_engines)):
        raise UsageError(
            f"KVPSI_STATUS_PORT is {status_port}, and vLLM's own port is {own}; give another one"
            + (f", with {n_engines} ports in a row for so many engines." if n_engines > 1 else ".")
        )


def refuse_taken_port(status_port: int, n_engines: int = 1) -> None:
    """Raise UsageError if somebody listens where an engine's status is to be; call it before one does."""
    for port in range(status_port, status_port + n_engines) if status_port else ():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server's, which comes later
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError) as error:
                raise UsageError(f"KVPSI_STATUS_PORT: port {port} is taken ({error}); give another one.") from error


def is_asked_for(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ``KVPSI_VLLM`` says that the plugin is to be used.

    Raises:
        UsageError: it says neither yes nor no.
    """
    return _is_yes("KVPSI_VLLM", environ)


def _is_yes(name: str, environ: Mapping[str, str]) -> bool:
    text = environ.get(name, "").strip().lower()
    if text in _YES or text in _NO:
        return text in _YES
    raise UsageError(f"{name} is {text}; give 1 for yes, or 0 for no.")


def _with_variables(text: str) -> str:
    for option in ("--reserve", "--regrow-above", "--law"):
        text = text.replace(option, f"KVPSI_{option[2:].replace('-', '_').upper()}")
    return text if "KVPSI_" in text else f"KVPSI_LAW: {text}"


def _log(text: str | None) -> Path | None:
    if text is None:
        return None
    if Path(text).is_dir() or not os.access(Path(text).absolute().parent, os.W_OK):
        raise UsageError(f"KVPSI_LOG {text} cannot be written; name a file in a folder that is there.")
    return Path(text)


def _beside_others(environ: Mapping[str, str]) -> ShareSettings:
    weight = _number("KVPSI_SHARE_WEIGHT", environ.get("KVPSI_SHARE_WEIGHT", "1"), float)
    priority = _number("KVPSI_SHARE_PRIORITY", environ.get("KVPSI_SHARE_PRIORITY", "0"), int)
    try:
        return ShareSettings(weight, priority, folder=environ.get("KVPSI_SHARE_DIR", ""))
    except UsageError as error:
        raise UsageError(f"KVPSI_SHARE_WEIGHT, KVPSI_SHARE_PRIORITY: {error}") from error


def _number(name: str, text: str, kind: Callable[[str], Number]) -> Number:
    try:
        return kind(text)
    except ValueError as error:
        raise UsageError(f"{name} is {text}; give a {'whole ' if kind is int else ''}number.") from error


def _share(text: str) -> float:
    try:
        return units.parse_share(text)
    except UsageError as error:
        raise UsageError(f"KVPSI_CACHE_LIMIT: {error}") from error


def _port(text: str) -> int:
    if text.isdecimal() and int(text) < 1 << 16:
        return int(text)
    raise UsageError(f"KVPSI_STATUS_PORT is {text}, which is not a port; give a number below 65536, or 0 for none.")
