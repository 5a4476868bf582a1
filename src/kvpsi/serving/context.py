"""A model with one context for many sequences, in a cache that gives memory back."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import llama_cpp
from llama_cpp._internals import LlamaModel

from kvpsi.engines.loading import KV_TYPES, LoadSettings, load_model, usable_threads
from kvpsi.errors import CacheRefusedError, EnvironmentProblem, LayoutError, UsageError
from kvpsi.instrument import Instrument
from kvpsi.kv import CacheSettings, ElasticCache
from kvpsi.kv.fixed import FixedCache
from kvpsi.kv.pages import can_release
from kvpsi.kv.policies import Auto, EvictionPolicy
from kvpsi.kv.questions import Question, Questions

log = logging.getLogger("kvpsi")

_N_UBATCH = 512
_LONGEST_PIECE_BYTES = 256


class ContextLostError(EnvironmentProblem):
    """A context that was freed to make a larger one could not be made again."""


@dataclass(frozen=True, slots=True)
class ContextPlan:
    """How a context is made.

    Attributes:
        load: threads, type of the cache, and the cells that are wanted (``n_ctx``), as far as there is room.
        n_seq: sequences that there can be at once.
        settings: what forgetting must leave alone.
        policy: what is forgotten first.
        unified: whether all sequences share all cells; else each has an equal part to itself.
        cache_limit: most of the cache to use, a share.
        elastic: whether memory is to be given back, where that is possible.
    """

    load: LoadSettings
    n_seq: int
    settings: CacheSettings = field(default_factory=CacheSettings)
    policy: EvictionPolicy = field(default_factory=Auto)
    unified: bool = True
    cache_limit: float = 1.0
    elastic: bool = True


class ServedContext:
    """What the engine works with; its thread is the only one to use it, except for `tokenize` and what never changes.

    Args:
        model: the weights and the vocabulary, which are freed with it.
        plan: how the context is made.
        n_cells: tokens that it has room for at first.
        instrument: sees what the cache does.

    Attributes:
        ctx: llama.cpp's context.
        cache: through which every change to it goes.
        n_seq: sequences that there can be at once.
        n_batch: the most tokens of one decode.
        n_threads: with which it was made.

    Raises:
        EnvironmentProblem: there is no memory for the context.
        UsageError: the model is of a kind that cannot be served.
    """

    def __init__(
        self, model: LlamaModel, plan: ContextPlan, n_cells: int, *, instrument: Instrument | None = None
    ) -> None:
        self.model = model
        self.plan = plan
        self.n_seq = plan.n_seq
        self.n_vocab = model.n_vocab()
        self.growing_bytes = 0
        self.lost = False
        self._instrument = instrument
        self._pieces: dict[int, bytes] = {}
        if llama_cpp.llama_model_is_recurrent(model.model) or llama_cpp.llama_model_is_hybrid(model.model):
            raise UsageError(
                "This model remembers in recurrent layers, of which no part can be taken back or shared: it cannot be "
                "served, but `kvpsi generate` runs it."
            )
        self.n_swa = int(llama_cpp.llama_model_n_swa(model.model))
        self._make(n_cells)
        self.n_batch = int(llama_cpp.llama_n_ubatch(self.ctx))

    @property
    def wanted_cells(self) -> int:
        """Cells that it may grow to."""
        return max(self.plan.load.n_ctx, self.cache.n_cells)

    @property
    def n_ctx(self) -> int:
        """The most tokens of one conversation, prompt and answer."""
        most = self.wanted_cells if self.plan.unified else self.wanted_cells // self.n_seq
        return min(most, self.model.n_ctx_train() or most)

    def _make(self, n_cells: int) -> None:
        params = _context_params(self.plan, n_cells)
        questions = Questions() if self.plan.policy.heeds_questions and self.plan.elastic and can_release() else None
        if questions is not None:
            questions.tap.put_into(params)
        ctx = llama_cpp.llama_init_from_model(self.model.model, params)
        if not ctx:
            raise EnvironmentProblem(
                f"llama.cpp could not make a context of {n_cells} tokens; free memory, or use a smaller -c."
            )
        self.ctx = ctx
        self.n_threads = int(llama_cpp.llama_n_threads(ctx))
        try:
            self.cache = self._make_cache(ctx, questions)
        except BaseException:
            llama_cpp.llama_free(ctx)
            raise
        self.cache.cap_cells = int(self.plan.cache_limit * self.cache.n_cells)

    def _make_cache(self, ctx: llama_cpp.llama_context_p, questions: Questions | None) -> ElasticCache | FixedCache:
        if self.plan.elastic:
            try:
                return ElasticCache(
                    ctx,
                    settings=self.plan.settings,
                    policy=self.plan.policy,
                    instrument=self._instrument,
                    questions=questions,
                )
            except LayoutError as error:
                log.warning("kvpsi gives no memory of this model back: %s", error)
                llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(ctx), False)
        return FixedCache(ctx, settings=self.plan.settings)

    def grow(self, n_cells: int) -> list[int]:
        """Make the context anew with room for so many tokens, or as it was if there is no memory for that.

        Everything that it holds is saved and loaded again.

        Returns:
            the sequences that could not be loaded again; they are empty now.

        Raises:
            ContextLostError: no context could be made any more, and there is none now.
        """
        before, n_before = self.cache, self.cache.n_cells
        held = [s for s in range(self.n_seq) if self.last_pos(s) >= 0]
        states = {seq_id: before.save_sequence(seq_id) for seq_id in held}
        self.growing_bytes = n_cells * before.bytes_per_cell
        try:
            before.close()
            llama_cpp.llama_free(self.ctx)
            self.lost = True
            try:
                self._make(n_cells)
            except (EnvironmentProblem, MemoryError, OSError):
                self._make_again(n_before)
            self.lost = False
            self.cache.take_over(before)
            return [seq_id for seq_id, state in states.items() if not self._load(state, seq_id)]
        finally:
            self.growing_bytes = 0
            for state in states.values():
                state.close()

    def _make_again(self, n_cells: int) -> None:
        try:
            self._make(n_cells)
        except (EnvironmentProblem, MemoryError, OSError) as error:
            raise ContextLostError(
                f"There is not even memory for a context of {n_cells} tokens any more ({error}); start it again."
            ) from error

    def _load(self, state: mmap.mmap, seq_id: int) -> bool:
        try:
            return self.cache.load_sequence(state, seq_id)
        except CacheRefusedError:
            return False

    def last_pos(self, seq_id: int) -> int:
        """The largest position of a sequence, -1 if it is empty."""
        return int(llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self.ctx), seq_id))

    def question_of(self, seq_id: int) -> Question | None:
        """What is being asked in a sequence, as far as that is heeded."""
        return self.cache.question_of(seq_id) if isinstance(self.cache, ElasticCache) else None

    def resume_question(self, seq_id: int, question: Question | None) -> None:
        """The same is asked in a sequence that is loaded, or read again."""
        if isinstance(self.cache, ElasticCache):
            self.cache.resume_question(seq_id, question)

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a control token."""
        found = self._pieces.get(token)
        if found is None:
            buffer = ctypes.create_string_buffer(_LONGEST_PIECE_BYTES)
            n = llama_cpp.llama_token_to_piece(self.model.vocab, token, buffer, _LONGEST_PIECE_BYTES, 0, False)
            found = self._pieces[token] = buffer.raw[: max(0, n)]
        return found

    def token_text(self, token: int) -> str:
        """What a token is called in a template, also a control token; empty if there is no such token."""
        return str(self.model.token_get_text(token)) if token >= 0 else ""

    def ends_answer(self, token: int) -> bool:
        """Whether a token is the model's end of an answer."""
        return bool(llama_cpp.llama_vocab_is_eog(self.model.vocab, token))

    def close(self) -> None:
        """Free context and weights."""
        if not self.lost:
            self.cache.close()
            llama_cpp.llama_free(self.ctx)
        self.model.close()


@contextlib.contextmanager
def open_context(
    path: Path,
    plan: ContextPlan,
    n_cells: int,
    *,
    instrument: Instrument | None = None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> Iterator[ServedContext]:
    """Load a model with such a context, unless it is not wanted any more before that is done.

    Raises:
        ModelFileError: llama.cpp would not load the model.
        EnvironmentProblem: there is no memory for the context.
        UsageError: the model is of a kind that cannot be served.
    """
    model = load_model(path, plan.load, is_wanted)
    try:
        served = ServedContext(model, plan, n_cells, instrument=instrument)
    except BaseException:
        model.close()
        raise
    try:
        yield served
    finally:
        served.close()


def _context_params(plan: ContextPlan, n_cells: int) -> llama_cpp.llama_context_params:
    params = llama_cpp.llama_context_default_params()
    threads = plan.load.n_threads or usable_threads()
    params.n_ctx = n_cells
    params.n_batch = params.n_ubatch = min(_N_UBATCH, n_cells)
    params.n_seq_max = plan.n_seq
    params.kv_unified = plan.unified
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.type_k = params.type_v = KV_TYPES[plan.load.kv_type]
    params.no_perf = True
    return params
