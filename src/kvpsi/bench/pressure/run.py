"""Runs all variants in both orders, and writes down after each what there is so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvpsi.bench.conversation import saved
from kvpsi.bench.pressure.plan import Plan
from kvpsi.bench.pressure.play import Run, play
from kvpsi.bench.pressure.plots import plot
from kvpsi.bench.pressure.report import document_of, write_files
from kvpsi.bench.processes import see_that_boards_can_be_made

Report = Callable[[str], None]


def run(plan: Plan, out_dir: Path, report: Report) -> dict[str, Any]:
    """The whole bench as one JSON-ready document; Ctrl-C ends it with what there is by then.

    A disk that is full does not end it: the document says so in ``problems``.
    """
    runs: list[Run] = []
    problems: list[str] = []
    interrupted = False
    try:
        see_that_boards_can_be_made(plan.board)
        report(f"reading a conversation of {plan.prompt_tokens} tokens")
        with saved(plan.model, plan.n_ctx, plan.prompt_tokens) as talk:
            for number in range(plan.rounds):
                for variant in plan.order(number):
                    if runs:
                        time.sleep(plan.cooldown_s)
                    report(f"round {number + 1} of {plan.rounds}: {variant}")
                    runs.append(play(plan, talk, variant, number + 1))
                    sentence = f"{variant} was killed before it generated anything: raise --memory."
                    if runs[-1].model_killed and not runs[-1].calm and sentence not in problems:
                        problems.append(sentence)
                    _write(out_dir, plan, runs, [], interrupted=True, problems=problems)
    except KeyboardInterrupt:
        interrupted = True
    pictures: list[str] = []
    try:
        pictures = plot(out_dir, plan, runs)
    except ImportError as error:
        problems.append(f"There are no plots ({error}); `pip install kvpsi[bench]` installs what they need.")
    except OSError as error:
        problems.append(f"There are no plots ({error.strerror or error}).")
    return _write(out_dir, plan, runs, pictures, interrupted=interrupted, problems=problems)


def _write(
    out_dir: Path, plan: Plan, runs: list[Run], pictures: list[str], *, interrupted: bool, problems: list[str]
) -> dict[str, Any]:
    """Write down what there is so far; the document of it. Without any run what an earlier bench left there stays."""
    if runs:
        try:
            return write_files(out_dir, plan, runs, pictures, interrupted=interrupted, problems=problems)
        except OSError as error:
            sentence = f"{out_dir} cannot be written ({error.strerror}), so there are no files."
            if sentence not in problems:
                problems.append(sentence)
    return document_of(plan, runs, interrupted=interrupted, raw=pictures, problems=problems)
