"""Turns the bytes of generated tokens into text as they come: whole characters, and nothing from a stop string on."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one answer.

    Only what cannot be shown yet is held back: the first bytes of a character, and the beginning of what may become a
    stop string.

    Args:
        stop: strings that end the answer and are not part of it.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped_by: str | None = None
        self._stop = tuple(s for s in stop if s)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, piece: bytes) -> str:
        """What can be shown now that one more token has come; nothing after a stop string."""
        if self.stopped_by is not None:
            return ""
        return self._cut(self._decoder.decode(piece), more_may_come=True)

    def finish(self) -> str:
        """What is left at the end; bytes that never became a character are shown as U+FFFD."""
        if self.stopped_by is not None:
            return ""
        return self._cut(self._decoder.decode(b"", final=True), more_may_come=False)

    def _cut(self, new: str, *, more_may_come: bool) -> str:
        if not self._stop:
            return new
        text = self._held + new
        self._held = ""
        found = [(at + len(s), at, s) for s in self._stop if (at := text.find(s)) >= 0]
        if found:  # the one that was complete first, however the text came in pieces
            _, at, self.stopped_by = min(found)
            return text[:at]
        kept = max(overlap(text, s) for s in self._stop) if more_may_come else 0
        shown = len(text) - kept
        self._held = text[shown:]
        return text[:shown]


def overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text are the first of a string, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
