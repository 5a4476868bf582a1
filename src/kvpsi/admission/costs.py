"""How long requests take, from how long the last ones took."""

from __future__ import annotations

import math

_REMEMBERED_S = 5.0
_USUAL_ANSWER_TOKENS = 128.0
_ANSWER_WEIGHT = 0.1
_READ_WEIGHT = 0.1
_GUESSED_PROMPT_TOKEN_S, _GUESSED_ANSWER_TOKEN_S = 0.005, 0.02


class Speed:
    """Seconds for one of something, over the last few seconds of doing it; None before the first."""

    def __init__(self) -> None:
        self._seconds = self._count = 0.0

    def note(self, count: float, seconds: float) -> None:
        """So many took so long."""
        keep = math.exp(-seconds / _REMEMBERED_S)
        self._seconds = keep * self._seconds + seconds
        self._count = keep * self._count + count

    @property
    def seconds(self) -> float | None:
        """For one."""
        return self._seconds / self._count if self._count > 0 else None


class Costs:
    """What the engine's time goes into; all figures in seconds of its time, whoever else uses the processors."""

    def __init__(self) -> None:
        self._prompt_token = Speed()
        self._answer_token = Speed()
        self._answer_tokens = _USUAL_ANSWER_TOKENS
        self._read_share = 1.0

    @property
    def are_known(self) -> bool:
        """Whether there was an answer yet; until then all is guessed, well enough to tell much work from little."""
        return self._answer_token.seconds is not None

    def note_prompt(self, n_tokens: int, seconds: float) -> None:
        """So many tokens of prompts were read."""
        self._prompt_token.note(n_tokens, seconds)

    def note_answers(self, n_tokens: int, seconds: float) -> None:
        """So many answers got a token each."""
        self._answer_token.note(n_tokens, seconds)

    def note_begun(self, n_prompt: int, n_cached: int) -> None:
        """Of a prompt so many tokens were there already."""
        self._read_share += _READ_WEIGHT * (1 - n_cached / max(1, n_prompt) - self._read_share)

    def note_end(self, n_generated: int) -> None:
        """An answer ended after so many tokens."""
        self._answer_tokens += _ANSWER_WEIGHT * (n_generated - self._answer_tokens)

    def work_s(self, n_prompt: int, max_tokens: int) -> float:
        """For a request that has yet to begin."""
        return self.rest_s(n_prompt * self._read_share, min(max_tokens, self._answer_tokens))

    def rest_s(self, n_prompt: float, n_answer: float) -> float:
        """For so many tokens that are still to be read, and to be written."""
        prompt_s = self._prompt_token.seconds or _GUESSED_PROMPT_TOKEN_S
        answer_s = self._answer_token.seconds or _GUESSED_ANSWER_TOKEN_S
        return n_prompt * prompt_s + n_answer * answer_s

    def left_to_write(self, n_generated: int, max_tokens: int) -> float:
        """Tokens that an answer will probably still get; one that is longer than most may get much longer."""
        usual = max(self._answer_tokens - n_generated, self._answer_tokens / 2)
        return max(1.0, min(max_tokens - n_generated, usual))
