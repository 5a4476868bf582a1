"""One answer while it is being generated."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvpsi.kv.questions import Question
from kvpsi.serving.request import Chosen, Event, Finished, FinishReason, Request, Text
from kvpsi.serving.sampling import Sampler
from kvpsi.serving.text import TextStream


class Answer:
    """The tokens of a prompt and of what follows it, and how many of them are in the cache.

    Args:
        request: what was asked.
        sampler: chooses its tokens; it is kept when the answer is paused.
        emit: takes its events.

    Attributes:
        question: what it answers, while it is paused.
        read_at: number of the decode in which tokens of its prompt were last read, 0 before the first.
        begun_s: when it was begun the last time.
    """

    def __init__(self, request: Request, sampler: Sampler, emit: Callable[[Request, Event], None]) -> None:
        self.request = request
        self.sampler = sampler
        self.tokens = list(request.prompt)
        self.seq_id = -1
        self.n_done = 0
        self.n_generated = 0
        self.cached_tokens = 0
        self.forgotten_tokens = 0
        self.pauses = 0
        self.read_at = 0
        self.begun_s = 0.0
        self.question: Question | None = None
        self.finished = False
        self.reason: FinishReason | None = None
        self.queued_s = 0.0
        self._emit = emit
        self._text = TextStream(request.stop)
        self._held: list[Chosen] = []

    @property
    def left(self) -> int:
        """Tokens that have yet to be decoded."""
        return len(self.tokens) - self.n_done

    @property
    def left_at_once(self) -> int:
        """How many of these may be decoded together.

        What was generated before a pause is read again one by one, as it was decoded then, if the answer is to be the
        same as without a pause.
        """
        n_prompt = len(self.request.prompt)
        if not self.pauses or not self.request.sampling.repeatable:
            return self.left
        return n_prompt - self.n_done if self.n_done < n_prompt else min(1, self.left)

    @property
    def writing(self) -> bool:
        """Whether its prompt has been read."""
        return self.n_generated > 0

    def begin(self, seq_id: int, n_done: int) -> None:
        """It has a sequence now, which holds so many of its first tokens already."""
        self.seq_id, self.n_done = seq_id, n_done
        self.begun_s = time.monotonic()
        if not self.pauses:
            self.cached_tokens = n_done
            self.queued_s = self.begun_s - self.request.arrived_s

    def take(self, token: int, piece: bytes, *, ends: bool, chosen: Chosen | None, most_tokens: int) -> None:
        """Take the next token.

        Args:
            token: which.
            piece: its bytes.
            ends: whether it is the model's end of the answer.
            chosen: how likely it was, if that was asked for.
            most_tokens: that the context holds.
        """
        self.n_generated += 1
        if ends:
            self.finish("stop")
            return
        self.tokens.append(token)
        if chosen is not None:
            self._held.append(chosen)
        self._show(self._text.feed(piece))
        if self._text.stopped_by is not None:
            self.finish("stop")
        elif self.n_generated >= self.request.max_tokens or len(self.tokens) >= most_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End it, with what was held back of its text."""
        rest = self._text.finish()
        if rest or self._held:
            self._show(rest, everything=True)
        self.finished, self.reason = True, reason
        n_prompt = len(self.request.prompt)
        self._emit(
            self.request,
            Finished(reason, n_prompt, self.n_generated, self.cached_tokens, self.forgotten_tokens, self.queued_s),
        )

    def _show(self, text: str, *, everything: bool = False) -> None:
        """Emit text, and the tokens so far with it."""
        if text or everything:
            self._emit(self.request, Text(text, tuple(self._held)))
            self._held.clear()
