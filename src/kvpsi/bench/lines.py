"""JSON lines between a bench and the processes of its models: {what: value}, one on a line."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any


def say(what: str, value: object) -> None:
    """One line for the parent."""
    print(json.dumps({what: value}), flush=True)


def said(line: str) -> tuple[str, Any]:
    """What a line says; ("", None) for the last one of a process that was killed in the middle of it."""
    try:
        ((what, value),) = json.loads(line).items()
    except (ValueError, AttributeError):
        return "", None
    return what, value


def until_closed() -> threading.Event:
    """An event that is set once standard input is closed: the parent wants this process to end, or is gone."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, name="kvpsi-bench-stdin", daemon=True).start()
    return ended
