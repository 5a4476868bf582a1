"""The text that ``kvpsi generate`` answers: a document, the prompt below it, and what neither may be."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kvpsi import units
from kvpsi.errors import EnvironmentProblem, UsageError

_LONGEST_FILE_BYTES = 64 << 20


def whole_prompt(prompt: str, files: Sequence[Path] = ()) -> str:
    """The documents, if any, and the prompt below them; ``-`` is what comes on standard input.

    Raises:
        UsageError: there is no text, or something else than text.
        EnvironmentProblem: a file cannot be read.
    """
    if [prompt, *map(str, files)].count("-") > 1:
        raise UsageError("Standard input can be read only once; name a file instead of one of the -.")
    try:
        if prompt == "-":
            prompt = _standard_input()
        prompt.encode("utf-8")  # what was no text comes as lone surrogates, depending on the locale
    except UnicodeError as error:
        raise UsageError("The prompt is not UTF-8 text; convert it first, for example with iconv.") from error
    _refuse_nul("The prompt", prompt)
    documents = [_read_document(file) for file in files]
    text = "\n\n".join(part.strip() for part in (*documents, prompt) if part.strip())
    if not text:
        raise UsageError("There is nothing to answer; give a prompt, as in: kvpsi generate 'What is a KV cache?'")
    return text


def _standard_input() -> str:
    if sys.stdin is None:
        raise UsageError("There is no standard input to read; give the text as the prompt, or name a file.")
    return sys.stdin.read(_LONGEST_FILE_BYTES)


def _read_document(file: Path) -> str:
    try:
        if str(file) == "-":
            text = _standard_input()
        else:
            if not file.is_file() and not file.is_fifo() and file.exists():
                raise EnvironmentProblem(
                    f"{file} is not a regular file; name a text file, or give the text on standard input with -."
                )
            with file.open(encoding="utf-8") as opened:
                text = opened.read(_LONGEST_FILE_BYTES)
        if len(text) >= _LONGEST_FILE_BYTES:
            raise UsageError(f"{file} is larger than {units.format_bytes(_LONGEST_FILE_BYTES)}; give a shorter text.")
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
