"""What is told while vLLM runs: sentences in vLLM's log, and everything as JSON lines in a file (``KVPSI_LOG``)."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from kvpsi.engines.vllm.settings import VllmSettings
from kvpsi.errors import UsageError
from kvpsi.instrument import Instrument, Instruments, JsonLines
from kvpsi.units import format_bytes

log = logging.getLogger("vllm.kvpsi")


def instrument_of(settings: VllmSettings, engine: int, stack: ExitStack) -> Instrument:
    """Tells what happens until ``stack`` is closed.

    Args:
        settings: name the file.
        engine: which of several data-parallel ones, each with a file of its own; the first is 0.
        stack: closes the file.

    Raises:
        UsageError: the file cannot be written.
    """
    instrument = Instruments([_Told()])
    if settings.log is not None:
        name = f"{settings.log.stem}-{engine}{settings.log.suffix}" if engine else settings.log.name
        instrument.members.append(JsonLines(stack.enter_context(_opened(settings.log.with_name(name)))))
    return instrument


class _Told(Instrument):
    """Writes into vLLM's log what is given for others, and why."""

    def __init__(self) -> None:
        self._reason: str | None = "nobody uses it yet"

    def event(self, name: str, value: Any) -> None:
        if name == "decision" and value.give_bytes:
            self._reason = value.reason
        elif name == "release":
            log.log(
                logging.INFO if self._reason else logging.DEBUG,
                "kvpsi gave back %s of %d KV blocks in %.0f ms: %s",
                format_bytes(value.returned_bytes),
                value.blocks,
                1e3 * value.seconds,
                self._reason or "nobody uses it any more",
            )
            self._reason = None


def _opened(log_file: Path) -> TextIO:
    try:
        return log_file.open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"KVPSI_LOG {log_file} cannot be written ({error.strerror}); name another file.") from error
