"""``kvpsi generate``: one answer, the cache governed while it is made."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpsi import models, units
from kvpsi.cli.output import print_json
from kvpsi.cli.pull import progress_on_stderr
from kvpsi.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    from kvpsi.engines.llama import GovernedLlama

_LONGEST_FILE_BYTES = 64 << 20


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads standard input.")] = "",
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A text to put before the prompt.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="As for `kvpsi pull`.")] = "default",
    ctx: Annotated[int, typer.Option("--ctx", "-c", help="Context in tokens, 0: as needed.")] = 0,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Most tokens to generate.")] = 256,
    threads: Annotated[int, typer.Option("--threads", "-t", help="Threads, 0: as many as can run.")] = 0,
    kv_type: Annotated[str, typer.Option("--kv-type", help="Type of the cache: f16 or q8_0.")] = "f16",
    temperature: Annotated[float, typer.Option("--temp", help="Temperature, 0: the likeliest words.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed for a temperature above 0.")] = 0,
    repeat_penalty: Annotated[float, typer.Option("--repeat-penalty", help="1: none.")] = 1.1,
    keep: Annotated[int, typer.Option("--keep", help="First tokens that are never forgotten.")] = 16,
    tail: Annotated[int, typer.Option("--tail", help="Last tokens that are never forgotten.")] = 256,
    min_prune: Annotated[int, typer.Option("--min-prune", help="Least tokens forgotten at once.")] = 64,
    cache_limit: Annotated[str, typer.Option("--cache-limit", help="Most of the cache to use: 70%, 0.7.")] = "100%",
    reserve: Annotated[str, typer.Option("--reserve", help="Headroom to keep free: 64M; auto.")] = "auto",
    regrow_above: Annotated[str, typer.Option("--regrow-above", help="Headroom from which to grow back.")] = "auto",
    log: Annotated[Path | None, typer.Option("--log", help="Write decisions to this file as JSON lines.")] = None,
    no_govern: Annotated[bool, typer.Option("--no-govern", help="Run stock llama.cpp for comparison.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Answer a prompt, and print one line about speed and memory afterwards (on standard error)."""
    from kvpsi.engines.loading import LoadSettings, fitting_context, open_llama, preview, show_errors_only
    from kvpsi.generation import Answer, Sampling
    from kvpsi.governor import LawSettings
    from kvpsi.kv import CacheSettings
    from kvpsi.pressure import open_source

    load = LoadSettings(n_ctx=ctx, n_threads=threads, kv_type=kv_type)
    sampling = Sampling(n_predict, temperature, seed, repeat_penalty)
    cache = CacheSettings(keep=keep, tail=tail, min_prune=min_prune)
    law = LawSettings(low_bytes=_size_or_auto(reserve), high_bytes=_size_or_auto(regrow_above))
    share = units.parse_share(cache_limit)
    text = _whole_prompt(prompt, file)

    show_errors_only()
    with progress_on_stderr() as report:
        path = models.pull(model, report)
    if log is not None and any(log.exists() and used.exists() and log.samefile(used) for used in (path, file or path)):
        raise UsageError(f"The log {log} would overwrite the model or the text; name another file.")
    known = preview(path, text)
    with contextlib.closing(open_source(working_set_file_bytes=path.stat().st_size)) as source:
        n_ctx, remark = fitting_context(known, n_predict, load, source.read().headroom, law)
    if remark:
        _say(remark)
    with contextlib.ExitStack() as stack:
        llm = stack.enter_context(contextlib.closing(open_llama(path, n_ctx, load)))
        governed = None if no_govern else stack.enter_context(_governed(llm, share, law, cache, log))
        answer = Answer(llm, governed, text, sampling)
        pieces = []
        with _reading_bar(governed, known.prompt_tokens) as done_reading:
            for piece in answer:
                done_reading()
                pieces.append(piece)
                if not json:
                    print(piece, end="", flush=True)
    if answer.report is None:
        return
    if json:
        print_json({"text": "".join(pieces), **dataclasses.asdict(answer.report), "line": answer.report.line()})
    else:
        print(flush=True)
        _say(answer.report.line())


@contextlib.contextmanager
def _governed(llm, share, law, cache, log: Path | None) -> Iterator[GovernedLlama | None]:  # type: ignore[no-untyped-def]
    """The governed model, or None with a remark where its cache has to be left alone."""
    from kvpsi.engines.llama import govern
    from kvpsi.errors import LayoutError
    from kvpsi.instrument import JsonLines

    with contextlib.ExitStack() as stack:
        instrument = None
        if log is not None:
            try:
                instrument = JsonLines(stack.enter_context(log.open("w", encoding="utf-8")))
            except OSError as error:
                raise UsageError(f"The log {log} cannot be written ({error.strerror}); name another file.") from error
        try:
            governed = govern(llm, cache_limit=share, settings=law, cache_settings=cache, instrument=instrument)
        except LayoutError as error:
            _say(f"not governed: {error}")
            yield None
            return
        yield stack.enter_context(governed)


@contextlib.contextmanager
def _reading_bar(governed, n_tokens: int):  # type: ignore[no-untyped-def]
    """A progress bar on a terminal while the prompt is read; calling what it yields takes it away."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal or governed is None) as bar:
        task = bar.add_task("reading the prompt", total=n_tokens)
        if governed is not None and console.is_terminal:
            governed.governor.monitor.subscribe(lambda _: bar.update(task, completed=governed.cache.used_cells))
        yield bar.stop


def _size_or_auto(text: str) -> int | None:
    return None if text == "auto" else units.parse_bytes(text)


def _whole_prompt(prompt: str, file: Path | None) -> str:
    """The document, if any, and the prompt below it."""
    try:
        if prompt == "-":
            prompt = sys.stdin.read()
        prompt.encode("utf-8")  # what was no text comes as lone surrogates, depending on the locale
    except UnicodeError as error:
        raise UsageError("The prompt is not UTF-8 text; convert it first, for example with iconv.") from error
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
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text; convert it first, for example with iconv.") from error
    except OSError as error:
        raise EnvironmentProblem(f"{file} cannot be read ({error.strerror}); check the path.") from error


def _say(sentence: str) -> None:
    print(f"kvpsi: {sentence}", file=sys.stderr, flush=True)
