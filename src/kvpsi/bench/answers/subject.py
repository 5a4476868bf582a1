"""The process of one model that goes through all conversations, one turn of each after the other.

It writes JSON lines: ``answer`` for each one, ``pressure`` after the first turns, when the neighbour may begin, and
``done`` at the end.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from kvpsi.bench.answers.models import open_model
from kvpsi.bench.lines import say
from kvpsi.engines.loading import show_errors_only


def main(argument: str) -> None:
    """Answer what ``argument`` says, a JSON object; see `kvpsi.bench.answers.play`."""
    told = json.loads(argument)
    turns, expected = told["turns"], told["expected"]
    show_errors_only()
    with open_model(
        told["variant"],
        Path(told["model"]),
        told["n_ctx"],
        len(turns),
        Path(told["pressure_file"]),
        Path(told["spill_dir"]),
    ) as model:
        talks: list[list[int]] = [[] for _ in turns]
        for turn in range(len(turns[0])):
            for number, talk in enumerate(talks):
                talk += turns[number][turn]
                began = time.monotonic()
                answer = model.answer(number, talk, told["n_predict"])
                say("answer", [number, turn, answer, time.monotonic() - began])
                # it goes on from what was said without pressure, so that each answer counts for itself
                talk += expected[number][turn] if expected else answer
            if turn == 0:
                say("pressure", True)
        say("done", model.figures())


if __name__ == "__main__":
    main(*sys.argv[1:2])
