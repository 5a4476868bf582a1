"""Every model answers alone and beside a neighbour, and it is counted how many answers are the same."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from kvpsi.bench.answers.models import Variant
from kvpsi.bench.answers.play import Answers, Played, Script, play
from kvpsi.bench.figures import Figure
from kvpsi.bench.processes import see_that_boards_can_be_made
from kvpsi.bench.prompts import draw
from kvpsi.bench.table import Table
from kvpsi.board import BoardSettings
from kvpsi.engines.loading import LoadSettings, load_model
from kvpsi.errors import UsageError
from kvpsi.hog import HogSettings

Tell = Callable[[str], None]
_LEAST_SAME = 0.95
_OPENING = "<|im_start|>user\n"
_GOING_ON = "<|im_end|>\n<|im_start|>user\n"
_CLOSING = "<|im_end|>\n<|im_start|>assistant\n"
_QUESTIONS = (
    "Which place is described in the sentence about person {}?",
    "What does person {} do?",
    "Repeat the whole sentence about person {}.",
    "Who is named right after person {}?",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked.

    Attributes:
        model: the GGUF file.
        variants: which models are compared.
        n_conversations: of them, in turns.
        n_turns: of each; the first is a long text.
        n_sentences: of that text, of about 11 tokens each.
        n_predict: tokens of each answer.
        n_ctx: tokens of all conversations together.
        board: the machine that model and neighbour share.
        hog: the neighbour.
        rounds: how often, each time with other texts.
        seed: of the texts.
    """

    model: Path
    variants: tuple[Variant, ...] = get_args(Variant)
    n_conversations: int = 8
    n_turns: int = 4
    n_sentences: int = 64
    n_predict: int = 24
    n_ctx: int = 16384
    board: BoardSettings = field(default_factory=lambda: BoardSettings(600 << 20, swap="zram"))
    hog: HogSettings = field(default_factory=lambda: HogSettings(300 << 20, 2 << 20, 0.5, 100 << 20))
    rounds: int = 1
    seed: int = 1

    def __post_init__(self) -> None:
        known = get_args(Variant)
        if not self.variants or not set(self.variants) <= set(known):
            raise UsageError(f"The variants are {', '.join(known)}, not {','.join(self.variants)}.")
        options = (("conversations", 1), ("turns", 2), ("sentences", 4), ("predict", 1))
        for name, least in (*((f"n_{option}", least) for option, least in options), ("rounds", 1)):
            value = getattr(self, name)
            if value < least:
                option = "--n-predict" if name == "n_predict" else f"--{name.removeprefix('n_')}"
                raise UsageError(f"{option} is {value}; give at least {least}.")
        needed = self.n_conversations * (self.n_sentences * 14 + self.n_turns * (self.n_predict + 40))
        if needed > self.n_ctx:
            raise UsageError(f"All conversations may take {needed} tokens, but there are {self.n_ctx}; raise -c.")


@dataclass(frozen=True, slots=True)
class Row:
    """One variant in one round, beside the neighbour; ``same_share`` is of the answers from the second turn on."""

    variant: str
    round_number: int
    answers: int
    same: int
    same_share: float
    median_answer_s: float
    median_calm_s: float
    forgotten_tokens: int
    model_killed: bool
    hog_killed: bool
    given_bytes: dict[str, int]


def run(plan: Plan, out_dir: Path, tell: Tell) -> dict[str, Any]:
    """The whole bench as one JSON-ready document; Ctrl-C ends it with what there is by then."""
    see_that_boards_can_be_made(plan.board)
    table = Table(out_dir / "answers.csv")
    rows: list[Row] = []
    interrupted = False
    try:
        for number in range(plan.rounds):
            script = _script(plan, number, out_dir)
            for variant in plan.variants if number % 2 == 0 else plan.variants[::-1]:
                tell(f"round {number + 1} of {plan.rounds}: {variant}, alone")
                alone = play(script, variant, None)
                expected = _by_conversation(plan, alone)
                tell(f"round {number + 1} of {plan.rounds}: {variant}, beside a neighbour")
                beside = play(script, variant, expected)
                rows.append(_row(variant, number, expected, alone, beside))
                table.add(asdict(rows[-1]))
    except KeyboardInterrupt:
        interrupted = True
    return {
        "plan": {**asdict(plan), "model": plan.model.name},
        "interrupted": interrupted,
        "runs": [asdict(row) for row in rows],
        "figures": [figure.as_json() for figure in figures_of(rows)],
        "problems": table.problems,
        "raw": table.paths,
    }


def _script(plan: Plan, number: int, out_dir: Path) -> Script:
    rng = random.Random(plan.seed + number)
    model = load_model(plan.model, LoadSettings(256, 1))
    try:

        def tokens_of(text: str) -> list[int]:
            return [int(t) for t in model.tokenize(text.encode(), False, True)]

        texts = draw(plan.n_conversations, plan.seed + number, plan.n_sentences)
        turns = [[tokens_of(turn) for turn in conversation(text, plan.n_turns, rng)] for text in texts]
    finally:
        model.close()
    return Script(plan.model, turns, plan.n_predict, plan.n_ctx, plan.board, plan.hog, out_dir)


def conversation(text: str, n_turns: int, rng: random.Random) -> list[str]:
    """What the user says in each turn: a text first, then questions about persons in it."""
    persons = [word for before, word in zip(text.split(), text.split()[1:], strict=False) if before == "Person"]
    asked = (rng.choice(_QUESTIONS).format(rng.choice(persons)) for _ in range(n_turns - 1))
    return [f"{_OPENING}{text}{_CLOSING}", *(f"{_GOING_ON}{question}{_CLOSING}" for question in asked)]


def _by_conversation(plan: Plan, played: Played) -> Answers:
    return [[played.answers[c, t] for t in range(plan.n_turns)] for c in range(plan.n_conversations)]


def _row(variant: str, number: int, expected: Answers, alone: Played, beside: Played) -> Row:
    said = [(c, t) for c, talk in enumerate(expected) for t in range(1, len(talk))]
    same = sum(beside.answers.get((c, t)) == expected[c][t] for c, t in said)
    figures = beside.figures or {}
    return Row(
        variant=variant,
        round_number=number,
        answers=len(said),
        same=same,
        same_share=same / len(said),
        median_answer_s=statistics.median(beside.seconds) if beside.seconds else 0.0,
        median_calm_s=statistics.median(alone.seconds),
        forgotten_tokens=int(figures.get("forgotten_tokens", 0)),
        model_killed=beside.figures is None,
        hog_killed=beside.hog is not None and beside.hog.killed_by is not None,
        given_bytes=dict(figures.get("given_bytes", {})),
    )


def figures_of(rows: Sequence[Row]) -> list[Figure]:
    """How many answers are the same; what the ladder is to reach."""
    found: list[Figure] = []
    for variant in dict.fromkeys(row.variant for row in rows):
        mine = [row for row in rows if row.variant == variant]
        share = sum(row.same for row in mine) / sum(row.answers for row in mine)
        target = _LEAST_SAME if variant == "ladder" else None
        found.append(Figure(f"{variant}.same_share", share, "", target, ">="))
        forgotten = sum(row.forgotten_tokens for row in mine)
        found.append(Figure(f"{variant}.forgotten", forgotten, "tokens", 0 if variant == "ladder" else None))
        killed = sum(row.model_killed + row.hog_killed for row in mine)
        found.append(Figure(f"{variant}.killed", killed, "processes", 0 if variant == "ladder" else None))
        found.append(Figure(f"{variant}.median_answer", statistics.median(r.median_answer_s for r in mine), "s"))
        found.append(Figure(f"{variant}.median_answer_alone", statistics.median(r.median_calm_s for r in mine), "s"))
    return found
