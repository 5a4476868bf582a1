"""Sizes and shares as people type them: ``600M``, ``1.5GiB``, ``8G``, ``70%``.

``K``, ``M``, ``G``, ``T`` and ``KiB`` … ``TiB`` are powers of 1024, as in systemd and the kernel's own files;
``KB``, ``MB``, ``GB``, ``TB`` are powers of 1000. A bare number is bytes. Upper and lower case are the same.
"""

from __future__ import annotations

import re
from fractions import Fraction

from kvpsi.errors import UsageError

_NUMBER = r"(?P<number>[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_SIZE = re.compile(_NUMBER + r"\s*(?P<unit>[kmgt]i?b?|b)?", re.IGNORECASE | re.ASCII)
_PERCENT = re.compile(_NUMBER + r"\s*%", re.ASCII)
_PLAIN = re.compile(_NUMBER, re.ASCII)
_LONGEST_TEXT = 40
_LARGEST_BYTES = 1 << 60

_FACTORS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _FACTORS[_letter] = _FACTORS[f"{_letter}i"] = _FACTORS[f"{_letter}ib"] = 1024**_power
    _FACTORS[f"{_letter}b"] = 1000**_power


def parse_bytes(text: str) -> int:
    """Bytes meant by ``text``, at least 1, rounded down; UsageError where it is no size."""
    stripped = text.strip()
    match = _SIZE.fullmatch(stripped) if len(stripped) <= _LONGEST_TEXT else None
    if match is None:
        raise UsageError(f"{_shown(text)} is not a size: write it as 600M, 1.5GiB or a number of bytes.")
    size_bytes = int(Fraction(match["number"]) * _FACTORS[(match["unit"] or "").lower()])
    if not 1 <= size_bytes <= _LARGEST_BYTES:
        raise UsageError(f"The size {_shown(text)} is out of range: give at least 1 byte and at most 1 EiB.")
    return size_bytes


def parse_share(text: str) -> float:
    """Share (0 < share <= 1) meant by ``70%`` or ``0.7``; UsageError where it is none."""
    stripped = text.strip()
    if len(stripped) <= _LONGEST_TEXT:
        percent, plain = _PERCENT.fullmatch(stripped), _PLAIN.fullmatch(stripped)
        share = Fraction(0)
        if percent is not None:
            share = Fraction(percent["number"]) / 100
        elif plain is not None:
            share = Fraction(plain["number"])
        if 0 < share <= 1 and float(share) > 0:
            return float(share)
    raise UsageError(f"{_shown(text)} is not a share: write it as 70% or 0.7, above 0 and at most 100%.")


def parse_budget(text: str, total_bytes: int) -> int:
    """Bytes meant by a size, or by a percentage of ``total_bytes``; at least 1."""
    if text.strip().endswith("%"):
        return max(1, int(parse_share(text) * total_bytes))
    return parse_bytes(text)


def format_bytes(size_bytes: float) -> str:
    """``377487360`` as ``360 MiB``: three figures are plenty for a person."""
    size = float(size_bytes)
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    unit = units.pop(0)
    while units and abs(size) >= 1023.5:
        size /= 1024
        unit = units.pop(0)
    decimals = 1 if unit != "B" and abs(size) < 99.95 else 0
    number = f"{size:.{decimals}f}"
    return f"{number.removesuffix('.0')} {unit}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…")
