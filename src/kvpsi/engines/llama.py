"""Makes an existing `llama_cpp.Llama` elastic and governed, and undoes it again."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import llama_cpp

from kvpsi.engines.attach import Attachment
from kvpsi.errors import LayoutError, UsageError
from kvpsi.governor import Governor, LawSettings
from kvpsi.instrument import Instrument, Instruments
from kvpsi.kv import CacheSettings, ElasticCache, Trim
from kvpsi.kv.layout import refuse_unsupported, seq_state
from kvpsi.kv.policies import EvictionPolicy
from kvpsi.kv.statedata import HEADER_BYTES, sequence_from_whole
from kvpsi.pressure import PressureSource, open_source, open_trigger_from_environment

_ONLY_SEQUENCE = 0
_registry: weakref.WeakSet[GovernedLlama] = weakref.WeakSet()
_registry_lock = threading.Lock()
_default_cache_limit = 1.0


@dataclass(frozen=True, slots=True)
class Summary:
    """What has happened since `govern`, sizes in bytes."""

    capacity_bytes: int
    resident_bytes: int
    peak_resident_bytes: int
    limit_bytes: int
    releases: int
    trims: int
    interrupts: int
    returned_bytes: int
    stall_s: float
    trusted: bool
    reason: str


class GovernedLlama:
    """A `llama_cpp.Llama` under a governor; see `govern`. A context manager, undone by `close`."""

    def __init__(self, llm: llama_cpp.Llama, cache: ElasticCache, governor: Governor) -> None:
        self.llm = llm
        self.cache = cache
        self.governor = governor
        self._attached = Attachment()
        self._peak_cells = cache.used_cells
        self._closed = False

    def set_cache_limit(self, share: float) -> None:
        """Let the cache use at most ``share`` (0..1] of its cells, whatever the pressure; more is evicted."""
        self.cache.cap_cells = int(_valid_share(share) * self.cache.n_cells)
        self.cache.give_now()

    def summary(self) -> Summary:
        """Figures for people and logs."""
        cache, decision = self.cache, self.governor.decision
        resident = cache.resident_bytes()
        return Summary(
            capacity_bytes=cache.capacity_bytes,
            resident_bytes=resident,
            peak_resident_bytes=max(resident, self._peak_cells * cache.bytes_per_cell),
            limit_bytes=min(cache.limit_cells, cache.cap_cells) * cache.bytes_per_cell,
            releases=cache.releases,
            trims=cache.trims,
            interrupts=cache.interrupts,
            returned_bytes=cache.returned_bytes,
            stall_s=self.governor.stall_s,
            trusted=cache.trusted,
            reason=cache.distrust_reason or (decision.reason if decision else "not started"),
        )

    def close(self) -> None:
        """Stop governing and put the model's own methods back; the model keeps working. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self.governor.stop()
        self._attached.undo()
        self.cache.close()
        with _registry_lock:
            _registry.discard(self)

    def __enter__(self) -> GovernedLlama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what replaces the model's own methods -------------------------------------------------------------------

    def _attach(self) -> None:
        context, llm = self.llm._ctx, self.llm
        self._attached.replace(context, "decode", self._decode)
        self._attached.replace(context, "kv_cache_clear", self.cache.clear)
        self._attached.replace(context, "kv_cache_seq_rm", self._seq_rm)
        self._attached.replace(context, "kv_cache_seq_cp", self.cache.seq_cp)
        self._attached.replace(context, "kv_cache_seq_keep", self.cache.seq_keep)
        self._attached.replace(context, "kv_cache_seq_shift", self.cache.seq_add)
        self._attached.replace(llm, "generate", self._generate(llm.generate))
        self._attached.replace(llm, "save_state", self._save_state(llm.save_state))
        self._attached.replace(llm, "load_state", self._load_state)
        llm._stack.callback(self.close)

    def _decode(self, batch: Any) -> None:
        code = self.cache.decode(batch.batch, divisible=True)
        self._peak_cells = max(self._peak_cells, self.cache.used_cells)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def _seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        return self.cache.seq_rm(max(seq_id, 0), p0, p1)

    def _generate(self, original: Callable[..., Generator[int, Any, None]]) -> Callable[..., Generator[int, Any, None]]:
        def generate(tokens: Iterable[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
            prompt = list(tokens)
            self._recompute_what_was_forgotten(len(prompt))
            return original(prompt, *args, **kwargs)

        return generate

    def _recompute_what_was_forgotten(self, n_tokens: int) -> None:
        """Before a new prompt reuses the cache: if there is room for all of it, reuse only what has no gaps."""
        gap = self.cache.first_gap(_ONLY_SEQUENCE)
        if gap < self.llm.n_tokens and n_tokens <= self.cache.allowed_cells:
            self.llm.n_tokens = gap
            self.llm._requires_eval = True

    def _save_state(self, original: Callable[[], Any]) -> Callable[[], Any]:
        def save_state() -> Any:
            with self.cache.exclusively():
                return original()

        return save_state

    def _load_state(self, state: Any) -> None:
        """`llama_cpp.Llama.load_state`, except that the cache is not filled with zeros first."""
        llm = self.llm
        header = seq_state(llm.ctx, _ONLY_SEQUENCE)[:HEADER_BYTES]
        data = sequence_from_whole(bytes(state.llama_state), header)
        self.cache.clear()
        if not self.cache.load_sequence(data, _ONLY_SEQUENCE):
            raise RuntimeError("Failed to set llama state data")
        llm.scores[: state.n_tokens, :] = state.scores.copy()
        rest = llm.scores[state.n_tokens :, :]
        rest[rest > 0] = 0.0
        llm.input_ids = state.input_ids.copy()
        llm.n_tokens = state.n_tokens
        llm._requires_eval = True
        llm._seed = state.seed


class _Echo(Instrument):
    """Tells the governor what a trim gave, wherever it happened."""

    def __init__(self) -> None:
        self.governor: Governor | None = None

    def event(self, name: str, value: Any) -> None:
        if name == "trim" and self.governor is not None and isinstance(value, Trim):
            self.governor.record_given(value.release.returned_bytes)


def _valid_share(share: float) -> float:
    if not 0.0 < share <= 1.0:
        raise UsageError(f"A cache limit of {share} makes no sense; give a share above 0 and at most 1, such as 0.7.")
    return share


def _make_elastic(
    llm: llama_cpp.Llama, settings: CacheSettings | None, policy: EvictionPolicy | None, instrument: Instrument
) -> ElasticCache:
    """An elastic cache for a model that may hold tokens already: they are saved, and restored into it."""
    ctx = llm.ctx
    refuse_unsupported(ctx)
    memory = llama_cpp.llama_get_memory(ctx)
    held = range(int(llama_cpp.llama_n_seq_max(ctx)))
    others = [s for s in held if s != _ONLY_SEQUENCE and llama_cpp.llama_memory_seq_pos_max(memory, s) >= 0]
    if others:
        raise LayoutError("The context holds several sequences already; govern it before they are decoded.")
    in_use = llama_cpp.llama_memory_seq_pos_max(memory, _ONLY_SEQUENCE) >= 0
    state = seq_state(ctx, _ONLY_SEQUENCE) if in_use else b""
    try:
        cache = ElasticCache(ctx, settings=settings, policy=policy, instrument=instrument)
    except LayoutError:
        if state:
            source = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
            llama_cpp.llama_state_seq_set_data(ctx, source, len(state), _ONLY_SEQUENCE)
        raise
    if state:
        cache.load_sequence(state, _ONLY_SEQUENCE)
    llm._requires_eval = True
    return cache


def govern(
    llm: llama_cpp.Llama,
    *,
    cache_limit: float | None = None,
    settings: LawSettings | None = None,
    cache_settings: CacheSettings | None = None,
    policy: EvictionPolicy | None = None,
    source: PressureSource | None = None,
    instrument: Instrument | None = None,
) -> GovernedLlama:
    """Make a model's KV cache elastic and keep it within what the machine can spare, until closed.

    Unused cache memory goes back to the operating system at once and is taken again as tokens come; when others need
    memory, the oldest tokens between the first ``keep`` and the last ``tail`` are forgotten and their memory goes
    back, too. The model's public methods work as before.

    Args:
        llm: the model; also one that is in use already.
        cache_limit: largest share (0..1] of the cache's cells to use, as `set_cache_limit`.
        settings: constants of the control law.
        cache_settings: what eviction must leave alone.
        policy: what is forgotten first (default: the oldest).
        source: where readings come from (default: this machine's kernel).
        instrument: sees every reading, decision and release.

    Raises:
        LayoutError: the model's cache is of a kind that pages cannot be returned from; the model is unchanged.
        UsageError: the model is governed already, or a setting makes no sense.
    """
    share = _valid_share(cache_limit if cache_limit is not None else _default_cache_limit)
    with _registry_lock:
        if any(g.llm is llm for g in _registry):
            raise UsageError("This model is governed already; close that first or use the object it returned.")
    echo = _Echo()
    instruments = Instruments([echo] if instrument is None else [echo, instrument])
    cache = _make_elastic(llm, cache_settings, policy, instruments)
    weights_bytes = int(llama_cpp.llama_model_size(llm.model))
    readings = source if source is not None else open_source(working_set_file_bytes=weights_bytes)
    trigger, _ = open_trigger_from_environment()
    governor = Governor(cache, readings, settings=settings, instrument=instruments, trigger=trigger)
    echo.governor = governor
    governed = GovernedLlama(llm, cache, governor)
    governed._attach()
    governed.set_cache_limit(share)
    governor.start()
    with _registry_lock:
        _registry.add(governed)
    return governed


def set_cache_limit(share: float) -> None:
    """Let every governed model of this process, and those to come, use at most ``share`` (0..1] of its cache.

    Raises:
        UsageError: the share is not above 0 and at most 1.
    """
    global _default_cache_limit
    _default_cache_limit = _valid_share(share)
    with _registry_lock:
        governed = list(_registry)
    for each in governed:
        each.set_cache_limit(share)
