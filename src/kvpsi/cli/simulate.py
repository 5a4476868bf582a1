"""``kvpsi simulate``: the control law and others on a simulated board."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kvpsi.cli import fleet as fleets
from kvpsi.cli.bench.show import in_words, show, status_on_stderr, usable_folder
from kvpsi.cli.output import one_line, print_json
from kvpsi.cli.situation import (
    DEFAULT_NEIGHBOURS,
    BoardOption,
    ConversationsOption,
    CtxOption,
    FirstTokensOption,
    JobsOption,
    KvTypeOption,
    MemoryOption,
    ModelOption,
    NeighboursOption,
    SecondsOption,
    SeedOption,
    SwapOption,
    SystemOption,
    ThinkOption,
    TraceOption,
    board_of,
    check_counts,
    given_in,
    neighbours_in,
    remarks_on,
    told,
    trace_in,
)
from kvpsi.errors import UsageError

if TYPE_CHECKING:
    from kvpsi.sim.play import Outcome
    from kvpsi.sim.situation import Situation
    from kvpsi.sim.validation import Compared

N = TypeVar("N", int, float)
_MOST_MODELS = 256
_ONE, _MODELS, _FLEET, _VALIDATE = "one", "models", "fleet", "validate"
_ONLY_FOR = {
    "trace": (_ONE,),
    "out_dir": (_ONE,),
    "controllers": (_ONE, _FLEET),
    "conversations": (_ONE, _MODELS),
    "think_s": (_ONE, _MODELS),
    "weights": (_MODELS,),
    "priorities": (_MODELS,),
    "routers": (_FLEET,),
    "load": (_FLEET,),
    "poll_s": (_FLEET,),
}
"""Options that do not fit to all that can be simulated: one model, several models, a fleet, runs that were recorded."""
_FOR_RECORDED = {"validate", "model", "json"}


def simulate(
    context: typer.Context,
    board: BoardOption = "",
    memory: MemoryOption = "",
    system: SystemOption = "0",
    swap: SwapOption = "",
    model: ModelOption = "3b",
    kv_type: KvTypeOption = "f16",
    ctx: CtxOption = 16384,
    neighbours: NeighboursOption = DEFAULT_NEIGHBOURS,
    trace: TraceOption = None,
    controllers: Annotated[str, typer.Option("--controllers", help="Whom to compare.")] = (
        "safe,static,avg10,headroom,offload,kvpsi"
    ),
    models: Annotated[int, typer.Option("--models", help="Governed models on one board, instead of controllers.")] = 1,
    weights: Annotated[str, typer.Option("--weights", help="Of their shares, such as 1,2.")] = "1",
    priorities: Annotated[str, typer.Option("--priorities", help="Of their shares, such as 0,1.")] = "0",
    seeds: Annotated[int, typer.Option("--seeds", help="Situations, each played with every controller.")] = 20,
    seconds: SecondsOption = 120.0,
    conversations: ConversationsOption = 2,
    first_tokens: FirstTokensOption = 2000,
    think_s: ThinkOption = 4.0,
    reserve: Annotated[str, typer.Option("--reserve", help="Headroom that kvpsi keeps free: 64M; auto.")] = "auto",
    regrow_above: Annotated[str, typer.Option("--regrow-above", help="Headroom to grow back from: 128M.")] = "auto",
    forget_rate: Annotated[str, typer.Option("--forget-rate", help="Most to forget a minute: 64M; 0; auto.")] = "auto",
    forget_burst: Annotated[str, typer.Option("--forget-burst", help="Most to forget at once: 64M; auto.")] = "auto",
    law: Annotated[str, typer.Option("--law", help="Other constants of kvpsi's law: calm_hold_s=1.")] = "",
    adapt: Annotated[bool, typer.Option("--adapt/--no-adapt", help="Have kvpsi's law learn from the board.")] = False,
    seed: SeedOption = 1,
    jobs: JobsOption = 0,
    validate: Annotated[
        list[Path] | None,
        typer.Option("--validate", help="Simulate this result.json of `bench pressure` instead, or all in a folder."),
    ] = None,
    fleet: Annotated[int, typer.Option("--fleet", help="Simulate so many boards behind a router instead.")] = 0,
    routers: Annotated[str, typer.Option("--routers", help="Whom to compare in a fleet.")] = fleets.ROUTERS,
    load: Annotated[float, typer.Option("--load", help="Of a fleet, as a share of what it could answer.")] = 0.7,
    poll_s: Annotated[float, typer.Option("--poll-s", help="How often a router asks a board how it is.")] = 1.0,
    out_dir: Annotated[Path, typer.Option("--out-dir", help="Where plots go.")] = Path("out/simulate"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Try a board, a model and neighbours that are not here: kvpsi's own law beside other ways to size a cache."""
    from kvpsi.governor.options import adapt_settings, law_settings
    from kvpsi.sim.conversation import Talk
    from kvpsi.sim.llms import llm_named
    from kvpsi.sim.many import SAFE, controllers_in, figures, play_all, row
    from kvpsi.sim.situation import Situation

    given = given_in(context)
    _refuse_what_does_not_fit(given, _mode(given))
    if validate:
        _validate(validate, model, as_json=json)
        return
    check_counts(seeds, jobs)
    machine = board_of(board, memory, system if "system" in given else "", swap)
    beside = neighbours_in("" if trace is not None and "neighbours" not in given else neighbours)
    law_constants, learning = (
        law_settings(reserve, regrow_above, forget_rate, forget_burst, law),
        adapt_settings(adapt, law),
    )
    if "fleet" in given:
        from kvpsi.sim.fleet.situation import Fleet

        n_seeds = seeds if "seeds" in given else fleets.SEEDS
        fleets.simulate_fleet(
            Fleet(
                fleet,
                machine,
                llm_named(model, kv_type),
                ctx,
                beside,
                Talk(first_tokens=first_tokens),
                load=load,
                seconds=seconds,
                poll_s=poll_s,
                law=law_constants,
                adapt=learning,
            ),
            _names(controllers) if "controllers" in given else ["kvpsi"],
            _names(routers),
            range(seed, seed + n_seeds),
            jobs,
            as_json=json,
        )
        return
    situation = Situation(
        board=machine,
        llm=llm_named(model, kv_type),
        n_ctx=ctx,
        neighbours=beside,
        trace=trace_in(trace),
        talk=Talk(n_conversations=conversations, first_tokens=first_tokens, think_s=think_s),
        seconds=seconds,
        law=law_constants,
        adapt=learning,
    )
    if "models" in given:
        _together(situation, models, weights, priorities, range(seed, seed + seeds), jobs or None, as_json=json)
        return
    names = controllers_in(_names(controllers))
    problems = remarks_on(situation)
    if SAFE in names and situation.safe_ctx() < 1:
        problems.append("Nothing is safe: beside the neighbours at their most this model does not fit without a cache.")
        names = tuple(name for name in names if name != SAFE)
        if not names:
            raise UsageError(f"{problems[0]} Take a smaller model or smaller neighbours, or add other --controllers.")
    folder = usable_folder(out_dir)
    with status_on_stderr() as say:
        found = play_all(situation, names, range(seed, seed + seeds), jobs or None, say)
    problems += [f"With {name} no answer was begun; give more --seconds." for name in _silent(found)]
    rate_s = situation.forget_tokens_s
    rows = [row(name, outcomes, rate_s) for name, outcomes in found.items()]
    document: dict[str, Any] = {
        "situation": dataclasses.asdict(situation),
        "safe_ctx": situation.safe_ctx(),
        "table": rows,
        "figures": [figure.as_json() for figure in figures(found, rate_s)],
        "problems": problems,
        "raw": [],
    }
    try:
        from kvpsi.sim.plots import plot

        document["raw"] = plot(folder, found)
    except ImportError:
        document["problems"].append("There are no plots without matplotlib: `pip install kvpsi[bench]` installs it.")
    except OSError as error:
        document["problems"].append(f"The plots cannot be written ({error.strerror}).")
    for problem in document["problems"]:
        print(f"kvpsi: {one_line(problem)}", file=sys.stderr)
    if json:
        print_json(document)
        return
    print(told(situation.board, situation.llm))
    _print(rows)


def _mode(given: set[str]) -> str:
    """What is simulated.

    Raises:
        UsageError: several of them are asked for.
    """
    modes = [mode for mode in (_VALIDATE, _FLEET, _MODELS) if mode in given]
    if len(modes) > 1:
        raise UsageError(f"{' and '.join(f'--{mode}' for mode in modes)} cannot be used together; leave one out.")
    return modes[0] if modes else _ONE


def _refuse_what_does_not_fit(given: set[str], mode: str) -> None:
    asked = given - _FOR_RECORDED if mode == _VALIDATE else given & _ONLY_FOR.keys()
    wrong = sorted(name for name in asked if mode not in _ONLY_FOR.get(name, ()))
    if not wrong:
        return
    options = ", ".join("--" + name.replace("_", "-") for name in wrong)
    if mode == _ONE:
        fits = sorted({f"--{each}" for name in wrong for each in _ONLY_FOR[name]})
        raise UsageError(f"{options} cannot be used without {' or '.join(fits)}; give that, too.")
    raise UsageError(f"{options} cannot be used with --{mode}; leave one or the other out.")


def _silent(found: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Controllers with which nothing was written, though nobody was killed."""
    return [
        name
        for name, outcomes in found.items()
        if not any(each.written_tokens or "model" in each.killed for each in outcomes)
    ]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _validate(paths: list[Path], model: str, *, as_json: bool) -> None:
    from kvpsi.sim.llms import llm_named
    from kvpsi.sim.validation import compare, figures

    llm = llm_named(model)
    files = [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise UsageError(f"There is no result.json in {', '.join(map(str, paths))}; `kvpsi bench pressure` writes one.")
    compared = [each for file in files for each in compare(file, llm)]
    rows = [{**dataclasses.asdict(each), "right": each.is_right} for each in compared]
    document = {"runs": rows, "figures": [figure.as_json() for figure in figures(compared)]}
    show(document, as_json=as_json, words=() if as_json else map(_beside, compared))


def _beside(run: Compared) -> str:
    """What was measured, and what was predicted."""
    died, predicted = ("killed" if was else "lives" for was in (run.killed, run.predicted_killed))
    return (
        f"{run.file}, {run.variant} ({run.rounds}): {died}, predicted {predicted}; "
        f"KV {run.final_tokens} tokens at the end, predicted {run.predicted_final_tokens}; "
        f"at most {run.peak_tokens}, predicted {run.predicted_peak_tokens}; "
        f"stall {run.stall_s:.2f} s, predicted {run.predicted_stall_s:.2f} s{'' if run.is_right else ': WRONG'}"
    )


def _together(
    situation: Situation,
    n_models: int,
    weights: str,
    priorities: str,
    seeds: Sequence[int],
    n_jobs: int | None,
    *,
    as_json: bool,
) -> None:
    """Several governed models, in place of one with several controllers."""
    from kvpsi.sim.processes import spread
    from kvpsi.sim.together.many import figures, play_drawn, row
    from kvpsi.sim.together.situation import Drawn

    if not 2 <= n_models <= _MOST_MODELS:
        raise UsageError(f"--models {n_models} makes no sense; give 2 to {_MOST_MODELS}, or leave it out.")
    drawn = Drawn(
        situation,
        n_models,
        _numbers("--weights", weights, float),
        _numbers("--priorities", priorities, int),
    )
    drawn.together(seeds[0])  # complains of what cannot be before any of it is played
    problems = remarks_on(situation)
    if drawn.least_bytes + situation.most_beside_bytes > situation.board.memory_bytes:
        problems.append("Even without caches so many models do not fit beside the neighbours at their most.")
    outcomes = []
    with status_on_stderr() as say:
        for outcome in spread(play_drawn, [(drawn, seed) for seed in seeds], n_jobs):
            outcomes.append(outcome)
            say(f"simulating, {len(outcomes)} of {len(seeds)}")
    if not any(outcome.short_share for outcome in outcomes):
        problems.append("Memory was never short, so that nothing was shared; give less --memory, or larger contexts.")
    rows = [row(each[0].name, each) for each in zip(*(outcome.tenants for outcome in outcomes), strict=True)]
    show(
        {
            "situation": dataclasses.asdict(drawn),
            "table": rows,
            "figures": [figure.as_json() for figure in figures(outcomes)],
            "problems": problems,
        },
        as_json=as_json,
        words=map(in_words, rows),
    )


def _numbers(option: str, text: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    try:
        return tuple(kind(each) for each in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text} is no list of numbers; give them as 1,2.") from error


def _print(rows: list[dict[str, object]]) -> None:
    """A column for each controller."""
    from rich.console import Console
    from rich.table import Table

    table = Table("mean of the runs", *[str(row["controller"]) for row in rows])
    for key in [key for key in rows[0] if key != "controller"]:
        table.add_row(key.replace("_", " "), *[f"{row[key]:g}" for row in rows])
    Console().print(table)
