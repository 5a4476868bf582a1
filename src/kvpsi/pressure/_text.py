"""What all parsers of kernel text share: the private error and the strict reading of counters."""

from __future__ import annotations

from collections.abc import Collection

_MAX_COUNT = 1 << 64


class MalformedTextError(ValueError):
    """Text from the kernel that does not look as documented. Sources turn it into a ``problems`` sentence."""


def parse_count(text: str, what: str) -> int:
    """A non-negative decimal below 2**64, as the kernel prints counters and sizes.

    Stricter than ``int``: no sign, no underscores, no digits of other scripts, nothing that would later
    overflow a float. Raises MalformedTextError.
    """
    if text.isascii() and text.isdigit() and len(text) <= 20:
        value = int(text)
        if value < _MAX_COUNT:
            return value
    raise MalformedTextError(f"{what} is not a count: {text[:40]!r}")


def find_fields(text: str, separator: str, wanted: Collection[str]) -> dict[str, str]:
    """The values of the lines ``<key><separator><value>``; keys that are missing are missing in the result.

    Searching for a dozen keys is three times as fast as splitting the fifty to two hundred lines of such a file.
    """
    found = {}
    text = f"\n{text}"
    for key in wanted:
        mark = f"\n{key}{separator}"
        start = text.find(mark)
        if start >= 0:
            end = text.find("\n", start + 1)
            found[key] = text[start + len(mark) : end if end >= 0 else None].strip()
    return found


def parse_flat_keyed(text: str, wanted: Collection[str]) -> dict[str, int]:
    """``key value`` lines (memory.stat, vmstat), only the wanted keys.

    A wanted key without a count raises MalformedTextError; missing keys are missing in the result.
    """
    return {key: parse_count(value, key) for key, value in find_fields(text, " ", wanted).items()}
