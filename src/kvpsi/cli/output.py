"""What commands print: one JSON document, or text for people, never both on standard output."""

from __future__ import annotations

import json
from collections.abc import Mapping

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""


def print_json(document: Mapping[str, object]) -> None:
    """Print one JSON document and a newline; figures must be finite, so that every parser takes it."""
    print(json.dumps(document, indent=2, allow_nan=False))


def one_line(text: str) -> str:
    """``text`` without line breaks and control characters, which a file name may smuggle in."""
    return "".join(char if char.isprintable() else " " for char in " ".join(text.split()))
