"""``kvpsi serve``: a model behind OpenAI's API."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvpsi import models, units
from kvpsi.cli.output import one_line
from kvpsi.cli.pull import progress_on_stderr
from kvpsi.cli.settings import cache_settings, remark_on_protection
from kvpsi.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    from kvpsi.serving.server import ServerSettings

_HELD = "KVPSI_HELD_WITHIN_LIMITS"


def serve(
    model: Annotated[str, typer.Option("--model", "-m", envvar="KVPSI_MODEL", help="As for `kvpsi pull`.")] = "default",
    alias: Annotated[str, typer.Option("--alias", envvar="KVPSI_ALIAS", help="What clients call it.")] = "",
    host: Annotated[str, typer.Option("--host", envvar="KVPSI_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", envvar="KVPSI_PORT", help="Port, 0: a free one.")] = 8080,
    ctx: Annotated[
        int, typer.Option("--ctx-size", "--ctx", "-c", envvar="KVPSI_CTX_SIZE", help="Tokens of all conversations.")
    ] = 0,
    parallel: Annotated[int, typer.Option("--parallel", "-np", envvar="KVPSI_PARALLEL", help="Answers at once.")] = 8,
    threads: Annotated[int, typer.Option("--threads", "-t", envvar="KVPSI_THREADS", help="0: as many as can run.")] = 0,
    adapt_threads: Annotated[
        bool,
        typer.Option(
            "--adapt-threads/--no-adapt-threads",
            envvar="KVPSI_ADAPT_THREADS",
            help="Fewer while others need the processors.",
        ),
    ] = True,
    cpus: Annotated[
        float | None, typer.Option("--cpus", envvar="KVPSI_CPUS", help="Most processors to use: 0.5. Default: all.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", envvar="KVPSI_MEMORY", help="Most memory to use: 4G. Default: all.")
    ] = None,
    kv_type: Annotated[str, typer.Option("--kv-type", envvar="KVPSI_KV_TYPE", help="f16 or q8_0.")] = "f16",
    api_key: Annotated[
        list[str] | None, typer.Option("--api-key", help="May be repeated; default: none. Also KVPSI_API_KEY.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", envvar="KVPSI_API_KEY_FILE", help="A file with a key a line.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", envvar="KVPSI_ALLOW_ORIGIN", help="Of pages that may ask (CORS), or *."),
    ] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", envvar="KVPSI_LOG_REQUESTS", help="Print a line for each request.")
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", envvar="KVPSI_CHAT_TEMPLATE", help="A file with a Jinja template.")
    ] = None,
    queue: Annotated[int, typer.Option("--queue", envvar="KVPSI_QUEUE", help="Requests that may wait.")] = 64,
    queue_timeout_s: Annotated[
        float, typer.Option("--queue-timeout-s", envvar="KVPSI_QUEUE_TIMEOUT_S", help="How long a request may wait.")
    ] = 60.0,
    admission: Annotated[
        str,
        typer.Option(
            "--admission", envvar="KVPSI_ADMISSION", help="Who may begin: adaptive, static, static:4, avg10, avg10:90%."
        ),
    ] = "adaptive",
    pace: Annotated[
        float,
        typer.Option("--pace", envvar="KVPSI_PACE", help="How much slower answers get while prompts are read; 0: any."),
    ] = 2.0,
    max_body: Annotated[str, typer.Option("--max-body", envvar="KVPSI_MAX_BODY", help="Largest request.")] = "8M",
    keep: Annotated[
        int, typer.Option("--keep", envvar="KVPSI_KEEP", help="First tokens that are never forgotten.")
    ] = 16,
    tail: Annotated[
        int, typer.Option("--tail", envvar="KVPSI_TAIL", help="Last tokens that are never forgotten.")
    ] = 256,
    turn: Annotated[
        int, typer.Option("--turn", envvar="KVPSI_TURN", help="Most tokens kept of the first turn, and of the last.")
    ] = 256,
    min_prune: Annotated[
        int, typer.Option("--min-prune", envvar="KVPSI_MIN_PRUNE", help="Least tokens forgotten at once.")
    ] = 64,
    policy: Annotated[
        str, typer.Option("--policy", envvar="KVPSI_POLICY", help="What is forgotten first: auto, streaming, ...")
    ] = "auto",
    cache_limit: Annotated[
        str, typer.Option("--cache-limit", envvar="KVPSI_CACHE_LIMIT", help="Most of the cache to use: 70%, 0.7.")
    ] = "100%",
    reserve: Annotated[
        str, typer.Option("--reserve", envvar="KVPSI_RESERVE", help="Headroom to keep free: 64M; auto.")
    ] = "auto",
    regrow_above: Annotated[
        str, typer.Option("--regrow-above", envvar="KVPSI_REGROW_ABOVE", help="Headroom from which to grow back.")
    ] = "auto",
    forget_rate: Annotated[
        str, typer.Option("--forget-rate", envvar="KVPSI_FORGET_RATE", help="Most to forget a minute: 64M; 0; auto.")
    ] = "auto",
    share_weight: Annotated[
        float, typer.Option("--share-weight", envvar="KVPSI_SHARE_WEIGHT", help="Of its memory beside other models.")
    ] = 1.0,
    share_priority: Annotated[
        int,
        typer.Option("--share-priority", envvar="KVPSI_SHARE_PRIORITY", help="Higher: gets its memory before others."),
    ] = 0,
    share_dir: Annotated[
        str, typer.Option("--share-dir", envvar="KVPSI_SHARE_DIR", help="Where models know each other; none: nowhere.")
    ] = "",
    law: Annotated[
        str, typer.Option("--law", envvar="KVPSI_LAW", help="Other constants of the law: calm_hold_s=1,grow_share=0.1.")
    ] = "",
    adapt: Annotated[
        bool, typer.Option("--adapt/--no-adapt", envvar="KVPSI_ADAPT", help="Have the law learn from this machine.")
    ] = False,
    heal: Annotated[
        bool, typer.Option("--heal/--no-heal", envvar="KVPSI_HEAL", help="Read again what was forgotten, when idle.")
    ] = True,
    spill_dir: Annotated[
        Path | None, typer.Option("--spill-dir", envvar="KVPSI_SPILL_DIR", help="Where idle conversations are parked.")
    ] = None,
    spill_max: Annotated[
        str, typer.Option("--spill-max", envvar="KVPSI_SPILL_MAX", help="The most that they take there; 0: none.")
    ] = "4G",
    log: Annotated[
        Path | None, typer.Option("--log", envvar="KVPSI_LOG", help="Write decisions as JSON lines.")
    ] = None,
    kv_unified: Annotated[
        bool, typer.Option("--kv-unified/--no-kv-unified", envvar="KVPSI_KV_UNIFIED", help="Share all of the cache.")
    ] = True,
    no_govern: Annotated[bool, typer.Option("--no-govern", help="Never give memory back, for comparison.")] = False,
) -> None:
    """Serve a model behind OpenAI's API until Ctrl-C; its memory shrinks when others need it."""
    from kvpsi.engines.loading import LoadSettings, show_errors_only

    try:
        from kvpsi.serving.server import ServerSettings, serve
        from kvpsi.serving.settings import EngineSettings
    except ImportError as error:
        raise EnvironmentProblem(
            f"The server needs packages that are not installed ({error.name}): `pip install kvpsi[serve]` does that."
        ) from error
    from kvpsi.admission import policy_named as admission_policy_named
    from kvpsi.cli.eventlog import EventLog
    from kvpsi.governor.options import adapt_settings, law_settings
    from kvpsi.governor.shares import ShareSettings
    from kvpsi.kv.policies import policy_named

    api_keys = _keys(api_key, api_key_file)
    if log is not None and no_govern:
        raise UsageError("--log writes down what governing decides, so it cannot be used with --no-govern.")
    show_errors_only()
    with progress_on_stderr() as report:
        path = models.pull(model, report)
    settings = ServerSettings(
        model=path,
        alias=alias or ("" if model == "default" else Path(model).stem),
        host=host,
        port=port,
        load=LoadSettings(n_ctx=ctx, n_threads=threads, kv_type=kv_type),
        engine=EngineSettings(
            parallel=parallel,
            most_waiting=queue,
            heals=heal,
            admission=admission_policy_named(admission),
            stretch=pace,
        ),
        cache=cache_settings(keep, tail, turn, min_prune),
        policy=policy_named(policy),
        law=law_settings(reserve, regrow_above, forget_rate, law=law),
        adapt=adapt_settings(adapt, law),
        share=ShareSettings(share_weight, share_priority, folder=share_dir),
        cache_limit=units.parse_share(cache_limit),
        api_keys=api_keys,
        allow_origins=tuple(origin.strip().rstrip("/") for origin in allow_origin or ()),
        log_requests=log_requests,
        chat_template=_text_of(chat_template),
        queue_timeout_s=queue_timeout_s,
        most_body_bytes=units.parse_bytes(max_body),
        spill_dir=spill_dir,
        spill_max_bytes=0 if spill_max.strip() == "0" else units.parse_bytes(spill_max),
        govern=not no_govern,
        adapt_threads=adapt_threads,
        unified=kv_unified,
    )
    _hold_within(cpus, memory)
    for remark in _remarks(settings):
        _say(remark)
    with contextlib.ExitStack() as stack:
        events = None if log is None else stack.enter_context(contextlib.closing(EventLog(log)))
        serve(settings, _say, events)
    if events is not None:
        events.raise_if_incomplete()


def _keys(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """All API keys; none is empty, or everybody would get in where somebody meant to keep them out."""
    keys = list(given or ())
    if given is None and (variable := os.environ.get("KVPSI_API_KEY")) is not None:
        keys = variable.replace(",", " ").split() or [""]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
            keys += [key for line in lines if (key := line.strip()) and not key.startswith("#")] or [""]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--api-key-file {file} cannot be read ({error}).") from error
    keys = [key.strip() for key in keys]
    if any(len(key.split()) > 1 for key in keys):
        raise UsageError("An API key has a blank in it, which no client can send; write one key a line, without it.")
    if not all(keys):
        raise UsageError(
            "An API key (--api-key, KVPSI_API_KEY, --api-key-file) is empty, which would let everybody in: give it a "
            "value, or leave it out."
        )
    return tuple(keys)


def _hold_within(cpus: float | None, memory: str | None) -> None:
    """Set the limits that were asked for, unless they are set: by starting the server again within them."""
    from kvpsi.board.limited import Limits, check, run_within

    limits = Limits(cpus, None if memory is None else units.parse_bytes(memory))
    if not limits:
        return
    if os.environ.get(_HELD) == "1":
        check(limits)
        return
    with _environment(_HELD, "1"):
        raise typer.Exit(run_within(limits, [sys.executable, "-m", "kvpsi", *sys.argv[1:]]))


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """A variable for the processes that are started meanwhile."""
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _remarks(settings: ServerSettings) -> Iterator[str]:
    """What was asked for and hardly meant."""
    from kvpsi.engines.loading import usable_threads
    from kvpsi.serving.size import DEFAULT_CELLS

    load, can_run = settings.load, usable_threads()
    if remark := remark_on_protection(settings.cache, load.n_ctx or DEFAULT_CELLS):
        yield remark
    if load.n_threads > can_run:
        yield f"{load.n_threads} threads are more than the {can_run} that can run; they will wait for each other"


def _text_of(template: Path | None) -> str | None:
    if template is None:
        return None
    try:
        return template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The chat template {template} cannot be read ({error}).") from error


def _say(text: str) -> None:
    print(f"kvpsi: {one_line(text)}", file=sys.stderr, flush=True)
