"""Models that answer several conversations, one question after the other, and what they do when memory is short."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import llama_cpp
import numpy as np

from kvpsi.bench.pressure.prune import SHARE
from kvpsi.engines.loading import LoadSettings
from kvpsi.engines.sensing import best_sensing
from kvpsi.errors import EnvironmentProblem
from kvpsi.governor import Governor
from kvpsi.kv import CacheSettings
from kvpsi.kv.policies import Auto, Streaming
from kvpsi.kv.spill import SpillFolder
from kvpsi.pressure.psi import parse_pressure
from kvpsi.serving.batch import Batch
from kvpsi.serving.context import ContextPlan, ServedContext, open_context
from kvpsi.serving.engine import Engine
from kvpsi.serving.headroom import SensedHeadroom
from kvpsi.serving.prefix import common_prefix
from kvpsi.serving.request import Event, Failed, Finished, Request, Text
from kvpsi.serving.sampling import SamplingSettings, logits_of
from kvpsi.serving.settings import EngineSettings

_THRESHOLD = 0.10
Variant = Literal["ladder", "streaming", "prune"]
"""``ladder`` is what `kvpsi serve` does; ``streaming`` gives back the memory of the oldest tokens of all conversations;
``prune`` drops them while avg10 is high, and returns nothing."""


class Answers(Protocol):
    """Answers with the likeliest tokens."""

    def answer(self, conversation: int, prompt: Sequence[int], n_tokens: int) -> list[int]:
        """The next tokens of a conversation that goes on from its earlier ones."""
        ...

    def figures(self) -> dict[str, object]:
        """What was given up for it so far."""
        ...


class Ladder:
    """The server's engine, without HTTP before it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def answer(self, conversation: int, prompt: Sequence[int], n_tokens: int) -> list[int]:  # noqa: ARG002
        """As a client with temperature 0 gets it; the engine finds out by itself which conversation it is."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        greedy = SamplingSettings(temperature=0.0)
        self._engine.submit(
            Request(prompt, events.put, sampling=greedy, max_tokens=n_tokens, top_logprobs=0, ignore_eos=True)
        )
        found: list[int] = []
        while not isinstance(event := events.get(), Finished):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Text):
                found += [each.chance.token for each in event.tokens]
        return found

    def figures(self) -> dict[str, object]:
        """By the rungs."""
        engine = self._engine
        return {
            "given_bytes": engine.memory.given_bytes,
            "forgotten_tokens": engine.counters.forgotten_tokens,
            "parked": engine.parking.written,
            "restored": engine.parking.read_again,
        }


class Flat:
    """All conversations lie in one cache, each in a sequence of its own; nobody gives way to another.

    Args:
        context: with a sequence for each.
        pruner: looks before every decode whether something is to be dropped; None: a governor does.
    """

    def __init__(self, context: ServedContext, pruner: Pruner | None) -> None:
        self._context = context
        self._pruner = pruner
        self._batch = Batch(context.n_batch)
        self._held: dict[int, list[int]] = {}

    def answer(self, conversation: int, prompt: Sequence[int], n_tokens: int) -> list[int]:
        """Read what is new, and write."""
        held = self._held.setdefault(conversation, [])
        shared = common_prefix(held, prompt)
        if shared < len(held):
            end = self._context.last_pos(conversation) + 1
            self._context.cache.seq_rm(conversation, end - (len(held) - shared), -1)
            del held[shared:]
        self._decode(conversation, prompt[shared:])
        found: list[int] = []
        while True:
            found.append(int(np.argmax(logits_of(self._context.ctx, -1, self._context.n_vocab))))
            if len(found) == n_tokens:
                return found
            self._decode(conversation, found[-1:])

    def _decode(self, conversation: int, tokens: Sequence[int]) -> None:
        most = self._context.n_batch
        for at in range(0, len(tokens), most):
            if self._pruner is not None:
                self._pruner.look()
            piece = tokens[at : at + most]
            self._batch.clear()
            self._batch.add(conversation, self._context.last_pos(conversation) + 1, piece, output=True)
            if code := self._context.cache.decode(self._batch.native, divisible=True):
                raise EnvironmentProblem(f"llama_decode returned {code}.")
        self._held[conversation] += tokens

    def figures(self) -> dict[str, object]:
        """What was forgotten."""
        cache = self._context.cache
        dropped = self._pruner.dropped_tokens if self._pruner is not None else cache.forgotten_cells
        return {"given_bytes": cache.given_bytes, "forgotten_tokens": dropped}


class Pruner:
    """What earlier prototypes do, for several sequences: `kvpsi.bench.pressure.prune` does it for one."""

    def __init__(self, context: ServedContext, pressure_file: Path, settings: CacheSettings, threshold: float) -> None:
        self._context, self._pressure_file = context, pressure_file
        self._settings, self._threshold = settings, threshold
        self.dropped_tokens = 0

    def look(self) -> None:
        """Drop the oldest tokens of all if the average is over the threshold; the others close up."""
        if parse_pressure(self._pressure_file.read_text()).some.avg10 < self._threshold:
            return
        keep, tail, least = self._settings.keep, self._settings.tail, self._settings.min_prune
        for seq_id in range(self._context.n_seq):
            n_tokens = self._context.last_pos(seq_id) + 1
            count = min(n_tokens - keep - tail, max(least, int(SHARE * n_tokens)))
            if count >= least:
                self._context.cache.seq_rm(seq_id, keep, keep + count)
                self._context.cache.seq_add(seq_id, keep + count, -1, -count)
                self.dropped_tokens += count


@contextlib.contextmanager
def open_model(
    variant: Variant, model: Path, n_ctx: int, n_conversations: int, pressure_file: Path, spill_dir: Path
) -> Iterator[Answers]:
    """A model that deals with a lack of memory in that way, on one thread.

    Args:
        variant: in which.
        model: the GGUF file.
        n_ctx: tokens of all conversations together.
        n_conversations: how many there are.
        pressure_file: where the board's stall is told.
        spill_dir: where conversations may be parked.
    """
    plan = ContextPlan(
        LoadSettings(n_ctx, n_threads=1),
        n_seq=EngineSettings().parallel + 1 if variant == "ladder" else n_conversations,
        policy=Auto() if variant == "ladder" else Streaming(),
        elastic=variant != "prune",
    )
    with open_context(model, plan, n_ctx) as context:
        source, trigger = best_sensing(int(llama_cpp.llama_model_size(context.model.model)))
        if variant == "ladder":
            room = SensedHeadroom()
            spill = SpillFolder(spill_dir, most_bytes=4 << 30, fingerprint=b"bench")
            engine = Engine(
                context,
                EngineSettings(),
                spare_bytes=room.spare_bytes,
                free_bytes=room.free_bytes,
                spill=spill,
                is_tight=room.is_tight,
            )
            with contextlib.closing(engine), Governor(engine.memory, source, trigger=trigger) as room.governor:
                yield Ladder(engine)
        elif variant == "streaming":
            with Governor(context.cache, source, trigger=trigger):
                yield Flat(context, None)
        else:
            source.close()
            yield Flat(context, Pruner(context, pressure_file, plan.settings, _THRESHOLD))
