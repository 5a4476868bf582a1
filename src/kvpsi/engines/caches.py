"""Gives a model's context its cache: pages where they can be given back, else by rebuilding."""

from __future__ import annotations

import ctypes
import functools
import logging
import time
from collections.abc import Callable

import llama_cpp

from kvpsi.errors import LayoutError
from kvpsi.instrument import Instrument
from kvpsi.kv import CacheSettings, ElasticCache, GatedCache, RebuildSettings, RebuiltCache
from kvpsi.kv.layout import refuse_unsupported, seq_state
from kvpsi.kv.pages import can_release
from kvpsi.kv.policies import Auto, EvictionPolicy, Streaming
from kvpsi.kv.questions import Questions
from kvpsi.kv.rebuild.context import RebuiltContext
from kvpsi.kv.statedata import address_of

log = logging.getLogger("kvpsi")

ONLY_SEQUENCE = 0
"""The one that `llama_cpp.Llama` uses."""

MakeCache = Callable[[llama_cpp.Llama, CacheSettings | None, EvictionPolicy | None, Instrument], GatedCache]
"""How the context of a model, emptied before, gets its cache; raises LayoutError where that cannot be."""


def make_elastic(
    llm: llama_cpp.Llama, settings: CacheSettings | None, policy: EvictionPolicy | None, instrument: Instrument
) -> GatedCache:
    """A cache that gives back pages; the context is made anew if a policy is asked for that heeds questions."""
    heeds_questions = policy is not None and policy.heeds_questions
    questions = _open_to_questions(llm) if heeds_questions and can_release() else None
    return ElasticCache(llm.ctx, settings=settings, policy=policy, instrument=instrument, questions=questions)


def _open_to_questions(llm: llama_cpp.Llama) -> Questions:
    """Make the empty context anew, such that the questions in it can be read."""
    questions = Questions()
    questions.tap.put_into(llm._ctx.params)
    n_cells = int(llama_cpp.llama_n_ctx(llm.ctx))
    context = RebuiltContext(llm._ctx, functools.partial(_equip, llm), lambda _: None, time.monotonic)
    context.resize(n_cells, n_cells)
    return questions


def _equip(llm: llama_cpp.Llama, ctx: llama_cpp.llama_context_p) -> bool:
    """Attach what else the model's first context had; False if that failed."""
    if llm._lora_adapter is None:
        return True
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(llm._lora_adapter)
    return bool(llama_cpp.llama_set_adapters_lora(ctx, adapters, 1, (ctypes.c_float * 1)(llm.lora_scale)) == 0)


def make_rebuilt(
    llm: llama_cpp.Llama,
    settings: CacheSettings | None,
    policy: EvictionPolicy | None,
    instrument: Instrument,
    *,
    pace: RebuildSettings | None = None,
) -> GatedCache:
    """A cache that is resized by rebuilding the context; it forgets the oldest, whatever the policy."""
    if policy is not None and not isinstance(policy, Streaming | Auto):
        log.warning("kvpsi forgets the oldest tokens first where the context is rebuilt; the policy is not used.")

    def on_rebuilt(kept: bool) -> None:
        llm._requires_eval = True
        if not kept:
            llm.n_tokens = 0

    return RebuiltCache(
        llm._ctx,
        settings=settings,
        pace=pace,
        instrument=instrument,
        equip=functools.partial(_equip, llm),
        on_rebuilt=on_rebuilt,
    )


def make_elastic_or_rebuilt(
    llm: llama_cpp.Llama,
    settings: CacheSettings | None,
    policy: EvictionPolicy | None,
    instrument: Instrument,
    *,
    pace: RebuildSettings | None = None,
) -> GatedCache:
    """Pages where they can be given back, else rebuilding."""
    try:
        return make_elastic(llm, settings, policy, instrument)
    except LayoutError as error:
        log.warning("kvpsi resizes this cache by rebuilding the context, as its pages cannot be given back: %s", error)
        return make_rebuilt(llm, settings, policy, instrument, pace=pace)


def make_cache(
    make: MakeCache,
    llm: llama_cpp.Llama,
    settings: CacheSettings | None,
    policy: EvictionPolicy | None,
    instrument: Instrument,
) -> GatedCache:
    """The cache of a model that may hold tokens already: they are saved, and restored into it."""
    ctx = llm.ctx
    refuse_unsupported(ctx)
    memory = llama_cpp.llama_get_memory(ctx)
    held = range(int(llama_cpp.llama_n_seq_max(ctx)))
    others = [s for s in held if s != ONLY_SEQUENCE and llama_cpp.llama_memory_seq_pos_max(memory, s) >= 0]
    if others:
        raise LayoutError("The context holds several sequences already; govern it before they are decoded.")
    in_use = llama_cpp.llama_memory_seq_pos_max(memory, ONLY_SEQUENCE) >= 0
    state = seq_state(ctx, ONLY_SEQUENCE) if in_use else b""
    llama_cpp.llama_memory_clear(memory, False)
    try:
        cache = make(llm, settings, policy, instrument)
    except BaseException:
        llm._requires_eval = True
        if state and not llama_cpp.llama_state_seq_set_data(ctx, address_of(state), len(state), ONLY_SEQUENCE):
            llm.n_tokens = 0
        raise
    if state and not cache.load_sequence(state, ONLY_SEQUENCE):
        llm.n_tokens = 0
    cache.note_tokens(ONLY_SEQUENCE, llm.input_ids[: llm.n_tokens].tolist())
    llm._requires_eval = True
    return cache
