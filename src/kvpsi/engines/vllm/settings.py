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


def refuse_vllms_port(ports: range, arguments: Sequence[str]) -> None:
    """Raise UsageError if vLLM's own port, by its command line, is among those of the status: both would take it, and
    vLLM not answer."""
    named = [after for option, after in pairwise(arguments) if option == "--port"]
    named += [option.partition("=")[2] for option in arguments if option.startswith("--port=")]
    own = named[-1] if named else "8000"
    if own in map(str, ports):
        raise UsageError(f"KVPSI_STATUS_PORT: {_listed(ports)}, and vLLM's own port is {own}; give another one.")


def refuse_taken_ports(ports: range) -> None:
    """Raise UsageError if somebody listens at a port of the status; call it before the status does."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server's, which comes later
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError) as error:
                raise UsageError(f"KVPSI_STATUS_PORT: port {port} is taken ({error}); give another one.") from error


def _listed(ports: range) -> str:
    return f"it is {ports[0]}" if len(ports) == 1 else f"its engines take {ports[0]} to {ports[-1]}"


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
    path = Path(text).absolute()
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"KVPSI_LOG {text} cannot be written; name a file that can be, in a folder that is there.")
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
