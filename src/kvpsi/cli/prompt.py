"""The text that ``kvpsi generate`` answers: a document, the prompt below it, and what neither may be."""

from __future__ import annotations

import sys
from pathlib import Path

from kvpsi import units
from kvpsi.errors import EnvironmentProblem, UsageError

_LONGEST_FILE_BYTES = 64 << 20


def whole_prompt(prompt: str, file: Path | None) -> str:
    """The document, if any, and the prompt below it; ``-`` is what comes on standard input."""
    try:
        if prompt == "-":
            prompt = sys.stdin.read()
        prompt.encode("utf-8")  # what was no text comes as lone surrogates, depending on the locale
    except UnicodeError as error:
        raise UsageError("The prompt is not UTF-8 text; convert it first, for example with iconv.") from error
    _refuse_nul("The prompt", prompt)
    document = _read_document(file) if file is not None else ""
    text = "\n\n".join(part.strip() for part in (document, prompt) if part.strip())
    if not text:
        raise UsageError("There is nothing to answer; give a prompt, as in: kvpsi generate 'What is a KV cache?'")
    return text


def _read_document(file: Path) -> str:
    try:
        if not file.is_file() and file.exists():
            raise EnvironmentProblem(
                f"{file} is not a regular file; name a text file, or give the text on standard input with -."
            )
        if file.stat().st_size > _LONGEST_FILE_BYTES:
            raise UsageError(f"{file} is larger than {units.format_bytes(_LONGEST_FILE_BYTES)}; give a shorter text.")
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text; convert it first, for example with iconv.") from error
    except OSError as error:
        raise EnvironmentProblem(f"{file} cannot be read ({error.strerror}); check the path.") from error
    _refuse_nul(str(file), text)
    if not text.strip():
        raise UsageError(f"{file} is empty; name a file with text in it, or leave --file out.")
    return text


def _refuse_nul(what: str, text: str) -> None:
    if "\0" in text:
        raise UsageError(
            f"{what} contains NUL bytes, so it is no plain text; convert it first, for example with iconv."
        )
