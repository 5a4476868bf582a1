"""How often prompts are read while answers are being written, so that these keep their pace."""

from __future__ import annotations

import math

from kvpsi.admission.costs import Speed
from kvpsi.serving.step import EVEN_PIECE_TOKENS, Turn

_REMEMBERED_S = 1.0
_GAPS = 30
_PATIENT_GAPS = 3 * _GAPS


class Pace:
    """Whose turn it is.

    Time that answers took is credit for prompts: with a stretch of 2 these get as much time, in pieces of
    `EVEN_PIECE_TOKENS`; where more are being read than written, so many times as much, or the first of many who come
    together would be written almost alone, while a decode with all of them hardly takes longer. As a piece takes as
    long as many tokens of answers, pieces of long prompts also keep a distance of so many tokens that 95 of 100 come at
    the usual pace; a prompt of one or two pieces is let through. Long prompts have their piece after three times as
    many at last, however many short ones come.

    Args:
        stretch: how much longer answers may take while prompts are read; at most 1: the two simply take turns.
    """

    def __init__(self, stretch: float) -> None:
        self._stretch = stretch
        self._prompt_token = Speed()
        self._credit_s = math.inf
        self._gaps = self._long_gaps = _PATIENT_GAPS
        self._answers_last = False
        self.token_s: float | None = None

    def note_answers(self, seconds: float, *, others_each: float = 0.0) -> None:
        """Every answer that is being written got a token; ``token_s`` is how long that takes, on average.

        ``others_each`` are the prompts that are being read, divided by the answers that are being written.
        """
        keep = math.exp(-seconds / _REMEMBERED_S)
        self.token_s = seconds if self.token_s is None else keep * self.token_s + (1 - keep) * seconds
        credit_s = (self._stretch - 1) * seconds * max(1.0, others_each)
        self._credit_s = min(self._credit_s + credit_s, 2 * self._piece_s)
        self._gaps += 1
        self._long_gaps += 1
        self._answers_last = True

    def note_prompts(self, n_tokens: int, seconds: float, *, beside: bool, is_long: bool) -> None:
        """Tokens of prompts were read, ``beside`` answers that had to wait for that, and of long ones."""
        self._prompt_token.note(n_tokens, seconds)
        self._answers_last = False
        if beside:
            self._credit_s -= seconds
            self._gaps = 0
            self._long_gaps = 0 if is_long else self._long_gaps
        else:
            self._credit_s = 2 * self._piece_s
            self._gaps = self._long_gaps = _PATIENT_GAPS

    def turn(self) -> Turn:
        """What may be decoded next, if there are both."""
        if self._stretch <= 1:
            return Turn.PROMPTS if self._answers_last else Turn.ANSWERS
        if self._credit_s < self._piece_s or not self._answers_last:
            return Turn.ANSWERS
        if self._gaps >= _GAPS or self._long_gaps >= _PATIENT_GAPS:
            return Turn.PROMPTS
        return Turn.SHORT_PROMPTS

    @property
    def _piece_s(self) -> float:
        return EVEN_PIECE_TOKENS * (self._prompt_token.seconds or 0.0)
