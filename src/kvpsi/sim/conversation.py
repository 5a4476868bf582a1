"""What is asked of a simulated model, and when."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvpsi.errors import UsageError


@dataclass(frozen=True, slots=True)
class Turn:
    """One question: at ``at_s`` at the earliest, ``prompt_tokens`` more of a conversation, which ``answer_tokens``
    follow. ``at_once``: what is read was read before, and is loaded from a file."""

    at_s: float
    conversation: str
    prompt_tokens: int
    answer_tokens: int
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class Talk:
    """How conversations are drawn.

    Attributes:
        n_conversations: that go on at the same time, one turn of one of them at a time.
        first_tokens: of the first prompt, on average (a document, a system prompt).
        prompt_tokens, answer_tokens: of a turn, on average.
        think_s: between an answer and the next turn of anybody, on average.
    """

    n_conversations: int = 2
    first_tokens: int = 600
    prompt_tokens: int = 120
    answer_tokens: int = 160
    think_s: float = 4.0

    def __post_init__(self) -> None:
        if min(self.n_conversations, self.first_tokens, self.prompt_tokens, self.answer_tokens) < 1:
            raise UsageError("There is one conversation at least, and one token at least in all that is said.")
        if not 0.01 <= self.think_s <= 1e6:
            raise UsageError(
                f"Between two questions there are 0.01 s at least and a million at most, not {self.think_s:g}."
            )


def draw(talk: Talk, until_s: float, seed: int) -> list[Turn]:
    """Turns until then; lengths and pauses are exponential around their means, the same ones for a seed."""
    rng = random.Random(seed)

    def about(mean: float) -> int:
        return max(1, int(rng.expovariate(1 / mean)))

    turns: list[Turn] = []
    begun: set[str] = set()
    at_s = 0.0
    while at_s < until_s:
        name = f"conversation {rng.randrange(talk.n_conversations) + 1}"
        n_prompt = about(talk.prompt_tokens if name in begun else talk.first_tokens)
        begun.add(name)
        turns.append(Turn(at_s, name, n_prompt, about(talk.answer_tokens)))
        at_s += rng.expovariate(1 / talk.think_s)
    return turns
