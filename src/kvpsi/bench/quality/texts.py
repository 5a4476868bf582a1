"""Texts that nobody tuned a policy on: those of Debian's documentation packages, or any others."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

from kvpsi.errors import UsageError

DEBIAN = (
    Path("/usr/share/debian-reference/debian-reference.en.txt.gz"),
    Path("/usr/share/doc/debian-policy/policy.txt.gz"),
    Path("/usr/share/doc/debian/FAQ/debian-faq.en.txt.gz"),
)
"""From the packages debian-reference-en, debian-policy and doc-debian."""


def texts(paths: Sequence[Path]) -> list[str]:
    """What the files say, also gzipped ones; without any, those of `DEBIAN` that are installed.

    Raises:
        UsageError: there is none, or one cannot be read.
    """
    chosen = list(paths) or [path for path in DEBIAN if path.exists()]
    if not chosen:
        raise UsageError(
            "There is no text to measure on: `apt install debian-reference-en debian-policy doc-debian`, or name "
            "files with --text."
        )
    return [_read(path) for path in chosen]


def _read(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UsageError(f"The text {path} cannot be read ({error}); name another one with --text.") from error
    return data.decode("utf-8", errors="replace")


def documents(tokenized: Sequence[Sequence[int]], count: int, n_tokens: int) -> list[list[int]]:
    """So many pieces of so many tokens, spread over all texts and without overlap.

    Raises:
        UsageError: there is not so much text.
    """
    slots = [(text, at) for text in tokenized for at in range(0, len(text) - n_tokens + 1, n_tokens)]
    if len(slots) < count:
        raise UsageError(
            f"{count} documents of {n_tokens} tokens are more than the {len(slots)} that the texts have; give more "
            "text with --text, or fewer documents."
        )
    step = len(slots) / count
    return [list(text[at : at + n_tokens]) for text, at in (slots[int(i * step)] for i in range(count))]
