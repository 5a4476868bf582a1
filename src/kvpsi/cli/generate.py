"""``kvpsi generate``: one answer, the cache governed while it is made."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpsi import models, units
from kvpsi.cli.output import print_json
from kvpsi.cli.prompt import whole_prompt
from kvpsi.cli.pull import progress_on_stderr
from kvpsi.cli.settings import cache_settings, remark_on_protection
from kvpsi.errors import CacheRefusedError, EnvironmentProblem, ModelFileError, UsageError

if TYPE_CHECKING:
    import llama_cpp

    from kvpsi.engines.llama import GovernedLlama
    from kvpsi.engines.loading import LoadSettings, Preview
    from kvpsi.generation import Answer, Report
    from kvpsi.governor import LawSettings
    from kvpsi.kv import CacheSettings

_SHORT_S = 2.0
_BUSY_SHARE = 0.25
_NO_ROOM = (
    "There is no room for more tokens below the cache's limit, and no more may be forgotten; free memory, raise "
    "--cache-limit, or lower --keep and --tail."
)


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads standard input.")] = "",
    file: Annotated[
        list[Path] | None, typer.Option("--file", "-f", help="A text to put before the prompt; may be repeated.")
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="As for `kvpsi pull`.")] = "default",
    ctx: Annotated[int, typer.Option("--ctx", "-c", help="Context in tokens, 0: as needed.")] = 0,
    n_predict: Annotated[int, typer.Option("--n-predict", "-n", help="Most tokens to generate.")] = 256,
    threads: Annotated[int, typer.Option("--threads", "-t", help="Threads, 0: as many as can run.")] = 0,
    adapt_threads: Annotated[
        bool, typer.Option("--adapt-threads/--no-adapt-threads", help="Fewer while others need the processors.")
    ] = True,
    kv_type: Annotated[str, typer.Option("--kv-type", help="Type of the cache: f16 or q8_0.")] = "f16",
    temperature: Annotated[float, typer.Option("--temp", help="Temperature, 0: the likeliest words.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed for a temperature above 0.")] = 0,
    repeat_penalty: Annotated[float, typer.Option("--repeat-penalty", help="1: none.")] = 1.1,
    keep: Annotated[int, typer.Option("--keep", help="First tokens that are never forgotten.")] = 16,
    tail: Annotated[int, typer.Option("--tail", help="Last tokens that are never forgotten.")] = 256,
    turn: Annotated[int, typer.Option("--turn", help="Most tokens kept of the first turn, and of the last.")] = 256,
    min_prune: Annotated[int, typer.Option("--min-prune", help="Least tokens forgotten at once.")] = 64,
    policy: Annotated[str, typer.Option("--policy", help="What is forgotten first: auto, streaming, ...")] = "auto",
    cache_limit: Annotated[str, typer.Option("--cache-limit", help="Most of the cache to use: 70%, 0.7.")] = "100%",
    reserve: Annotated[str, typer.Option("--reserve", help="Headroom to keep free: 64M; auto.")] = "auto",
    regrow_above: Annotated[str, typer.Option("--regrow-above", help="Headroom from which to grow back.")] = "auto",
    forget_rate: Annotated[str, typer.Option("--forget-rate", help="Most to forget a minute: 64M; 0; auto.")] = "auto",
    log: Annotated[Path | None, typer.Option("--log", help="Write decisions to this file as JSON lines.")] = None,
    no_govern: Annotated[bool, typer.Option("--no-govern", help="Run stock llama.cpp for comparison.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Answer a prompt, and print one line about speed and memory afterwards (on standard error)."""
    from kvpsi.cli.eventlog import EventLog
    from kvpsi.engines.loading import LoadSettings, preview, show_errors_only, usable_threads
    from kvpsi.generation import Answer, Sampling
    from kvpsi.governor.options import law_settings
    from kvpsi.kv.policies import policy_named

    if log is not None and no_govern:
        raise UsageError("--log writes down what governing decides, so it cannot be used with --no-govern.")
    load = LoadSettings(n_ctx=ctx, n_threads=threads, kv_type=kv_type)
    sampling = Sampling(n_predict, temperature, seed, repeat_penalty)
    cache, choice = cache_settings(keep, tail, turn, min_prune), policy_named(policy)
    law = law_settings(reserve, regrow_above, forget_rate)
    share = units.parse_share(cache_limit)
    files = file or []
    text = whole_prompt(prompt, files)

    show_errors_only()
    with progress_on_stderr() as report:
        path = models.pull(model, report)
    _refuse_overwriting(log, path, *files)
    known = preview(path, text)
    n_ctx = _fitting_context(path, known, n_predict, load, law)
    with contextlib.ExitStack() as stack:
        llm = stack.enter_context(contextlib.closing(_open(path, n_ctx, load)))
        events = None if log is None else stack.enter_context(contextlib.closing(EventLog(log)))
        options: dict[str, Any] = {"cache_limit": share, "settings": law, "cache_settings": cache, "policy": choice}
        options |= {"instrument": events, "adapt_threads": adapt_threads}
        governed = None if no_govern else stack.enter_context(_governed(llm, cache, options))
        answer = Answer(llm, governed, text, sampling)
        adapts = governed is not None and adapt_threads
        with _remark_on_busy_processors(1 if adapts else load.n_threads or usable_threads()):
            written = _write(answer, governed, known.prompt_tokens, show=not json)
    if answer.report is not None:
        _tell(written, answer.report, json)
    if events is not None:
        events.raise_if_incomplete()


def _refuse_overwriting(log: Path | None, *inputs: Path) -> None:
    if log is not None and any(log.exists() and each.exists() and log.samefile(each) for each in inputs):
        raise UsageError(f"The log {log} would overwrite the model or the text; name another file.")


def _fitting_context(path: Path, known: Preview, n_predict: int, load: LoadSettings, law: LawSettings) -> int:
    """The context to open in tokens; a remark is made if it is not as large as it was asked for."""
    from kvpsi.engines.loading import fitting_context
    from kvpsi.pressure import open_source

    with contextlib.closing(open_source(working_set_file_bytes=path.stat().st_size)) as source:
        n_ctx, remark = fitting_context(known, n_predict, load, source.read().headroom, law)
    if remark:
        _say(remark)
    return n_ctx


def _open(path: Path, n_ctx: int, load: LoadSettings) -> llama_cpp.Llama:
    """The model. Its file was looked at before, so what fails with the context fails for want of memory."""
    from kvpsi.engines.loading import open_llama

    try:
        return open_llama(path, n_ctx, load)
    except (MemoryError, ModelFileError) as error:
        if isinstance(error, ModelFileError) and "llama_context" not in str(error.__cause__):
            raise
        other_type = f", or use --kv-type f16 if this model cannot have {load.kv_type}" if load.kv_type != "f16" else ""
        raise EnvironmentProblem(
            f"A context of {n_ctx} tokens does not fit into the memory that this process can get; lower -c or free "
            f"memory{other_type}."
        ) from error


@contextlib.contextmanager
def _governed(llm: llama_cpp.Llama, cache: CacheSettings, options: Mapping[str, Any]) -> Iterator[GovernedLlama | None]:
    """The model governed with these options, or None with a remark where its cache has to be left alone."""
    from kvpsi.engines.llama import govern
    from kvpsi.errors import LayoutError

    try:
        governed = govern(llm, **options)
    except LayoutError as error:
        _say(f"not governed: {error}")
        yield None
        return
    with governed:
        if remark := remark_on_protection(cache, governed.cache.n_cells):
            _say(remark)
        yield governed


def _write(answer: Answer, governed: GovernedLlama | None, prompt_tokens: int, *, show: bool) -> str:
    """The text of the answer, on standard output as it comes if ``show``; what follows begins on a new line."""
    pieces: list[str] = []
    try:
        with _reading_bar(governed, prompt_tokens) as done_reading:
            for piece in answer:
                done_reading()
                pieces.append(piece)
                if show:
                    print(piece, end="", flush=True)
        if show:
            print(flush=True)
    except BaseException as error:
        if show and pieces:
            with contextlib.suppress(OSError):
                print(flush=True)
        if isinstance(error, CacheRefusedError):
            raise CacheRefusedError(_NO_ROOM) from error
        raise
    return "".join(pieces)


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


@contextlib.contextmanager
def _remark_on_busy_processors(n_threads: int) -> Iterator[None]:
    """llama.cpp's threads spin while they wait for each other: where others want the processors, fewer are faster."""
    began, stalled = time.monotonic(), _cpu_stall_s()
    yield
    took = time.monotonic() - began
    share = (_cpu_stall_s() - stalled) / took if took > _SHORT_S else 0.0
    if n_threads > 1 and share > _BUSY_SHARE:
        _say(
            f"for {share:.0%} of the time more threads wanted to run than there are processors, and llama.cpp's wait "
            f"for each other: -t {n_threads - 1} may be much faster than {n_threads}"
        )


def _cpu_stall_s() -> float:
    """Time so far in which something waited for a processor; 0 where the kernel does not tell."""
    from kvpsi.pressure.psi import parse_pressure

    try:
        return parse_pressure(Path("/proc/pressure/cpu").read_text()).some.total_us / 1e6
    except (OSError, ValueError):
        return 0.0


def _tell(text: str, report: Report, as_json: bool) -> None:
    if as_json:
        print_json({"text": text, **dataclasses.asdict(report), "line": report.line()})
    else:
        _say(report.line())


def _say(sentence: str) -> None:
    print(f"kvpsi: {sentence}", file=sys.stderr, flush=True)
