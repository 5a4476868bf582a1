"""``kvpsi tune``: settings of the law that cost least on a simulated board."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvpsi.cli.bench.show import in_words, show, status_on_stderr
from kvpsi.cli.output import print_json
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
    from kvpsi.sim.tuning import Choice

_WITH_COMPARE = {"seeds", "checks", "seed", "jobs", "compare", "json"}


def tune(
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
    seeds: Annotated[int, typer.Option("--seeds", help="To tune with.")] = 4,
    checks: Annotated[int, typer.Option("--checks", help="Other seeds, to check what was found.")] = 10,
    seconds: SecondsOption = 120.0,
    conversations: ConversationsOption = 2,
    first_tokens: FirstTokensOption = 2000,
    think_s: ThinkOption = 4.0,
    seed: SeedOption = 1,
    jobs: JobsOption = 0,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Compare fixed settings and learned ones on kvpsi's own workloads instead."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Search settings of the control law for a board, a model and neighbours; checked on seeds not used for it."""
    check_counts(seeds, jobs)
    if checks < 1:
        raise UsageError(f"--checks {checks} makes no sense; give 1 or more.")
    tuning_seeds, test_seeds = range(seed, seed + seeds), range(seed + seeds, seed + seeds + checks)
    given = given_in(context)
    if compare:
        if wrong := sorted(given - _WITH_COMPARE):
            options = ", ".join("--" + name.replace("_", "-") for name in wrong)
            raise UsageError(f"{options} cannot be used with --compare, which has its own boards; leave one out.")
        _compare(tuning_seeds, test_seeds, jobs or None, as_json=json)
        return
    from kvpsi.governor.adapt import AdaptSettings
    from kvpsi.sim.comparison import play_with
    from kvpsi.sim.controllers import Law
    from kvpsi.sim.conversation import Talk
    from kvpsi.sim.llms import llm_named
    from kvpsi.sim.situation import Situation
    from kvpsi.sim.tuning import Choice, Search

    situation = Situation(
        board=board_of(board, memory, system if "system" in given else "", swap),
        llm=llm_named(model, kv_type),
        n_ctx=ctx,
        neighbours=neighbours_in("" if trace is not None and "neighbours" not in given else neighbours),
        trace=trace_in(trace),
        talk=Talk(n_conversations=conversations, first_tokens=first_tokens, think_s=think_s),
        seconds=seconds,
    )
    if remarks := remarks_on(situation):
        raise UsageError(remarks[0])
    with status_on_stderr() as say:
        search = Search([situation], tuning_seeds, jobs or None, say)
        best = search.run()
        say("checking")
        checked = {
            name: play_with(situation, law, test_seeds, jobs or None).whole_s
            for name, law in (
                ("default", Law()),
                ("tuned", Law(best.choice.law)),
                ("online", Law(adapt=AdaptSettings())),
            )
        }
    document: dict[str, Any] = {
        "situation": dataclasses.asdict(situation),
        "tried": len(search.tried),
        "choice": dataclasses.asdict(best.choice),
        "options": options_of(best.choice),
        "cost_when_tuning_s": {"default": search.cost_of(Choice()).whole_s, "tuned": best.costs[0].whole_s},
        "cost_s": checked,
    }
    if json:
        print_json(document)
        return
    print(told(situation.board, situation.llm))
    print(
        f"cost, seconds lost a minute on {checks} other seeds: " + ", ".join(f"{k} {v:.2f}" for k, v in checked.items())
    )
    if best.choice == Choice():
        print(f"None of the {len(search.tried)} settings that were tried is better than the defaults.")
        if not checked["default"]:
            print("Nothing was lost with them: memory was never short. Give larger --neighbours, or more --seconds.")
    elif checked["tuned"] >= checked["default"]:
        print("What was best when tuning is no better on other seeds: keep the defaults, or give more --seeds.")
    else:
        print(f"kvpsi serve {document['options']}")


def _compare(tuning_seeds: range, test_seeds: range, n_jobs: int | None, *, as_json: bool) -> None:
    from kvpsi.sim.comparison import compare, figures
    from kvpsi.sim.workloads import WORKLOADS

    with status_on_stderr() as say:
        tuned, compared = compare(WORKLOADS, tuning_seeds, test_seeds, n_jobs, say)
    rows: list[dict[str, Any]] = [
        {
            "workload": each.workload,
            **{
                f"{name}{suffix}": round(getattr(getattr(each, name), field), 3)
                for suffix, field in (("", "later_s"), ("_whole", "whole_s"))
                for name in ("default", "tuned", "own", "online")
            },
            "own_is": options_of(each.own_choice) or "the defaults",
        }
        for each in compared
    ]
    document = {
        "tuned": options_of(tuned),
        "table": rows,
        "figures": [figure.as_json() for figure in figures(compared)],
    }
    words = [f"tuned for all: {document['tuned'] or 'the defaults'}", *map(in_words, rows)]
    show(document, as_json=as_json, words=words)


def options_of(choice: Choice) -> str:
    """Options of `kvpsi serve` that set what differs from the defaults; none if nothing does."""
    from kvpsi.sim.boards import MIB

    law = choice.law
    found = []
    if law.low_bytes is not None and law.high_bytes is not None:
        found.append(f"--reserve {law.low_bytes // MIB}M --regrow-above {law.high_bytes // MIB}M")
    changed = [
        f"{field.name}={getattr(law, field.name):g}"
        for field in dataclasses.fields(law)
        if isinstance(field.default, float) and getattr(law, field.name) != field.default
    ]
    if changed:
        found.append(f"--law {','.join(changed)}")
    return " ".join(found)
