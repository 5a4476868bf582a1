"""Makes an existing `llama_cpp.Llama` elastic and governed, and undoes it again."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import numbers
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import llama_cpp

from kvpsi.engines.attach import Attachment
from kvpsi.engines.caches import ONLY_SEQUENCE, MakeCache, make_cache, make_elastic, make_elastic_or_rebuilt
from kvpsi.engines.resting import Resting
from kvpsi.engines.sensing import best_sensing
from kvpsi.errors import UsageError
from kvpsi.governor import AdaptSettings, Governor, LawSettings
from kvpsi.governor.cpu import CpuGovernor
from kvpsi.governor.shares import ShareSettings
from kvpsi.governor.sharing import open_sharing
from kvpsi.governor.threads import ThreadSettings
from kvpsi.instrument import Instrument, guarded
from kvpsi.kv import CacheSettings, ElasticCache, GatedCache, RebuildSettings
from kvpsi.kv.forgetting import Forgetting
from kvpsi.kv.layout import seq_state
from kvpsi.kv.policies import EvictionPolicy
from kvpsi.kv.statedata import HEADER_BYTES, sequence_from_whole
from kvpsi.ladder import Ladder
from kvpsi.pressure import MonitorSettings, PressureSource, Trigger

log = logging.getLogger("kvpsi")

_USES_OF_THE_CONTEXT = ("pooling_type", "get_state_size", "set_n_threads", "reset_timings", "print_timings")
_registry: weakref.WeakSet[GovernedLlama] = weakref.WeakSet()
_registry_lock = threading.Lock()
_default_cache_limit = 1.0


@dataclass(frozen=True, slots=True)
class Summary:
    """What has happened since `govern`, sizes in bytes.

    ``given_bytes`` tells what was given up for ``returned_bytes``: unused pages (``slack``) and the rungs of the
    ladder. ``mode`` is how memory is given back: page by page while the context lives, or by rebuilding it.
    """

    capacity_bytes: int
    resident_bytes: int
    peak_resident_bytes: int
    limit_bytes: int
    releases: int
    trims: int
    interrupts: int
    returned_bytes: int
    given_bytes: dict[str, int]
    stall_s: float
    trusted: bool
    reason: str
    mode: Literal["pages", "rebuild", "fixed"]


class GovernedLlama:
    """A `llama_cpp.Llama` under a governor; see `govern`. A context manager, undone by `close`."""

    def __init__(self, llm: llama_cpp.Llama, cache: GatedCache, governor: Governor) -> None:
        self.llm = llm
        self.cache = cache
        self.governor = governor
        self._resting = Resting(llm, cache) if isinstance(cache, ElasticCache) else None
        if self._resting is not None:
            cache.ladder = Ladder((self._resting, Forgetting(weakref.ref(cache))))
        self.cpu_governor: CpuGovernor | None = None
        self._attached = Attachment()
        self._open_ones: list[GovernedLlama] = []
        self._closed = False

    def set_cache_limit(self, share: float) -> None:
        """Let the cache use at most ``share`` (0..1] of its cells, whatever the pressure; more is evicted."""
        self.cache.cap_cells = int(_valid_share(share) * self.cache.n_cells)
        self.cache.give_now()

    def heal(self) -> int:
        """Evaluate again what the model has forgotten, or what was dropped while it rested, if there is room.

        Returns how many tokens that were. The next prompt has the same done first, so this is for a moment in which
        nobody waits.

        Raises:
            CacheRefusedError: memory got short meanwhile.
        """
        llm = self.llm
        with self.cache.exclusively():
            evaluate = type(llm).eval
            n_tokens, resting = 0, self._resting
            if resting is not None and self.cache.used_cells + resting.dropped_tokens <= self.cache.allowed_cells:
                n_tokens = resting.restore(lambda tokens: evaluate(llm, tokens))
            gap, end = self.cache.first_gap(ONLY_SEQUENCE), llm.n_tokens
            if gap >= end or end > self.cache.allowed_cells:
                return n_tokens
            tokens = llm.input_ids[gap:end].tolist()
            llm.n_tokens = gap  # what comes after it is removed as the first of these is evaluated
            evaluate(llm, tokens)
            return n_tokens + len(tokens)

    def summary(self) -> Summary:
        """Figures for people and logs."""
        cache, decision = self.cache, self.governor.decision
        resident = cache.resident_bytes()
        return Summary(
            capacity_bytes=cache.capacity_bytes,
            resident_bytes=resident,
            peak_resident_bytes=max(resident, cache.peak_cells * cache.bytes_per_cell),
            limit_bytes=cache.allowed_cells * cache.bytes_per_cell,
            releases=cache.releases,
            trims=cache.trims,
            interrupts=cache.interrupts,
            returned_bytes=cache.returned_bytes,
            given_bytes=cache.given_bytes,
            stall_s=self.governor.stall_s,
            trusted=cache.trusted,
            reason=cache.distrust_reason or (decision.reason if decision else "not started"),
            mode=cache.mode,
        )

    def close(self) -> None:
        """Stop governing and put the model's own methods back; the model keeps working. May be called twice.

        Raises:
            RebuildError: the context is being resized and cannot be made; the tokens are kept, so close it again later.
        """
        self._end(self._restore_capacity)

    def _close_with_model(self) -> None:
        self._end(lambda: None)

    def _end(self, restore: Callable[[], None]) -> None:
        if self._closed:
            return
        self.governor.stop()
        if self.cpu_governor is not None:
            self.cpu_governor.stop()
        restore()
        self._closed = True
        self._open_ones.clear()
        self._attached.undo()
        self.cache.close()
        with _registry_lock:
            _registry.discard(self)

    def _restore_capacity(self) -> None:
        """Leave a context as large as it was; if there is no memory for it, a model that knows its smaller size."""
        self.cache.restore_capacity()
        llama_cpp.llama_set_n_threads(self.llm.ctx, *_threads_of(self.llm))
        held = int(llama_cpp.llama_n_ctx(self.llm.ctx))
        if held < self.llm._n_ctx:
            log.warning("kvpsi leaves the model with a context of %d instead of %d tokens.", held, self.llm._n_ctx)
            self.llm._n_ctx, self.llm.n_batch = held, min(self.llm.n_batch, held)

    def _govern_cpu(self) -> None:
        """Compute with as many threads as there is room for, and never more than the model was opened with."""
        self.cache.most_threads = _threads_of(self.llm)
        settings = ThreadSettings(most_threads=max(self.cache.most_threads))
        if settings.most_threads > 1:
            self.cpu_governor = CpuGovernor(self.cache, settings=settings, instrument=self.governor.instrument)
            self.cpu_governor.start()

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
        self._attached.replace(context, "kv_cache_clear", self._dropping(self.cache.clear))
        self._attached.replace(context, "kv_cache_seq_rm", self._seq_rm)
        self._attached.replace(context, "kv_cache_seq_cp", self.cache.seq_cp)
        self._attached.replace(context, "kv_cache_seq_keep", self.cache.seq_keep)
        self._attached.replace(context, "kv_cache_seq_shift", self.cache.seq_add)
        self._attached.replace(llm, "generate", self._generate(llm.generate))
        self._attached.replace(llm, "eval", self._using(llm.eval, llm.eval))
        self._attached.replace(llm, "reset", self._dropping(llm.reset))
        self._attached.replace(llm, "save_state", self._exclusively(self._using(llm.save_state, llm.eval)))
        self._attached.replace(llm, "load_state", self._exclusively(self._load_state))
        if self.cache.mode == "rebuild":
            self._attached.replace(context, "n_ctx", lambda: self.cache.n_cells)
            for name in _USES_OF_THE_CONTEXT:
                self._attached.replace(context, name, self._exclusively(getattr(context, name)))
        # the model holds this object until it is closed, also where both are dropped: the thread must end first
        self._open_ones.append(self)
        llm._stack.callback(_close_all, self._open_ones)

    def _exclusively(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*args: Any, **kwargs: Any) -> Any:
            with self.cache.exclusively():
                return original(*args, **kwargs)

        return locked

    def _using(self, original: Callable[..., Any], evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """A method that needs all that the model seems to hold."""

        def used(*args: Any, **kwargs: Any) -> Any:
            if self._resting is not None:
                with self.cache.exclusively():
                    self._resting.use(evaluate)
            return original(*args, **kwargs)

        return used

    def _dropping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A method after which nothing of what the model held is wanted."""

        def dropped(*args: Any, **kwargs: Any) -> Any:
            if self._resting is not None:
                self._resting.forget()
            return original(*args, **kwargs)

        return dropped

    def _decode(self, batch: Any) -> None:
        code = self.cache.decode(batch.batch, divisible=True)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")

    def _seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        return self.cache.seq_rm(max(seq_id, 0), p0, p1)

    def _generate(self, original: Callable[..., Generator[int, Any, None]]) -> Callable[..., Generator[int, Any, None]]:
        signature = inspect.signature(original)

        def generate(tokens: Iterable[int], *args: Any, **kwargs: Any) -> Generator[int, Any, None]:
            prompt = list(tokens)
            begins_anew = signature.bind(prompt, *args, **kwargs).arguments.get("reset", True)
            with self.cache.request(), self._asking(begins_anew):
                if begins_anew:
                    with self.cache.exclusively():
                        self._recompute_what_was_forgotten(len(prompt))
                yield from original(prompt, *args, **kwargs)

        return generate

    @contextlib.contextmanager
    def _asking(self, begins_anew: bool) -> Iterator[None]:
        """Lasts as long as the model is asked: it does not rest, and what it needs of what was dropped is there."""
        resting = self._resting
        if resting is None:
            yield
            return
        with self.cache.exclusively():
            if begins_anew:
                resting.forget()
            else:
                resting.use(self.llm.eval)
            resting.begin()
        try:
            yield
        finally:
            with self.cache.exclusively():
                resting.end()

    def _recompute_what_was_forgotten(self, n_tokens: int) -> None:
        """Before a new prompt reuses the cache: if there is room for all of it, reuse only what has no gaps."""
        gap = self.cache.first_gap(ONLY_SEQUENCE)
        if gap < self.llm.n_tokens and n_tokens <= self.cache.allowed_cells:
            self.llm.n_tokens = gap
            self.llm._requires_eval = True

    def _load_state(self, state: Any) -> None:
        """`llama_cpp.Llama.load_state`, except that the cache is not filled with zeros first.

        Raises:
            CacheRefusedError: the state does not fit; the model keeps what it had.
        """
        llm = self.llm
        header = seq_state(llm.ctx, ONLY_SEQUENCE)[:HEADER_BYTES]
        data = sequence_from_whole(bytes(state.llama_state), header)
        loaded = False
        try:
            if not self.cache.trusted:
                self.cache.clear()
            loaded = self.cache.load_sequence(data, ONLY_SEQUENCE)
        finally:
            if not loaded:
                self._forget_unless_kept()
        if not loaded:
            raise RuntimeError("Failed to set llama state data")
        llm.scores[: state.n_tokens, :] = state.scores.copy()
        rest = llm.scores[state.n_tokens :, :]
        rest[rest > 0] = 0.0
        llm.input_ids = state.input_ids.copy()
        llm.n_tokens = state.n_tokens
        llm._requires_eval = True
        llm._seed = state.seed
        self.cache.note_tokens(ONLY_SEQUENCE, llm.input_ids[: llm.n_tokens].tolist())

    def _forget_unless_kept(self) -> None:
        """After a state was refused: nothing is taken for granted unless the cache is what it was."""
        if not self.cache.used_cells or not self.cache.trusted:
            self.llm.n_tokens = 0
            self.llm._requires_eval = True


def _close_all(governed: list[GovernedLlama]) -> None:
    for each in list(governed):
        each._close_with_model()


def _threads_of(llm: llama_cpp.Llama) -> tuple[int, int]:
    """With how many it was opened, for single tokens and for batches."""
    return int(llm.n_threads), int(llm.n_threads_batch)


def _valid_share(share: float) -> float:
    if not isinstance(share, numbers.Real) or isinstance(share, bool):
        raise UsageError(f"A cache limit is a number above 0 and at most 1, such as 0.7, not {share!r}.")
    if not 0.0 < share <= 1.0:
        raise UsageError(f"A cache limit of {share} makes no sense; give a share above 0 and at most 1, such as 0.7.")
    return share


def govern(
    llm: llama_cpp.Llama,
    *,
    cache_limit: float | None = None,
    settings: LawSettings | None = None,
    cache_settings: CacheSettings | None = None,
    policy: EvictionPolicy | None = None,
    source: PressureSource | None = None,
    instrument: Instrument | None = None,
    rebuild: bool | RebuildSettings = True,
    monitor: MonitorSettings | None = None,
    make: MakeCache | None = None,
    adapt_threads: bool = True,
    share: ShareSettings | None = None,
    adapt: AdaptSettings | None = None,
) -> GovernedLlama:
    """Make a model's KV cache elastic and keep it within what the machine can spare, until closed.

    Unused cache memory goes back to the operating system at once and is taken again as tokens come; when others need
    memory, tokens between the first ``keep`` and the last ``tail`` are forgotten and their memory goes
    back, too. The model's public methods work as before.

    Where pages cannot be given back (cells on a GPU, an unknown layout, not Linux), the context is saved, freed and
    made again in another size instead; see `kvpsi.kv.RebuiltCache`. `GovernedLlama.summary` tells which it is.

    Args:
        llm: the model; also one that is in use already.
        cache_limit: largest share (0..1] of the cache's cells to use, as `set_cache_limit`.
        settings: constants of the control law.
        cache_settings: what eviction must leave alone.
        policy: what is forgotten first (default: the oldest). For one that heeds questions the context is made anew.
        source: where readings come from (default: this machine's kernel).
        instrument: sees every reading, decision and release.
        rebuild: whether the context may be rebuilt where pages cannot be given back; `RebuildSettings` allow it and
            say how often.
        monitor: how often readings are taken.
        make: how the model gets its cache, such as `kvpsi.engines.caches.make_rebuilt`; ``rebuild`` then says nothing.
        adapt_threads: whether fewer threads compute while others need the processors, or a quota leaves room for fewer.
        share: weight and priority among other governed models under the same limit (default: the same as all others;
            with a ``source`` of your own: it is alone).
        adapt: bounds within which the law's constants follow what the machine shows; None: they stay as they are.

    Raises:
        LayoutError: the model's cache is of a kind that cannot be resized, or not without rebuilding although
            ``rebuild`` is False; the model is unchanged.
        UsageError: the model is governed already, or a setting makes no sense.
    """
    _refuse_ungovernable(llm)
    most = _valid_share(cache_limit if cache_limit is not None else _default_cache_limit)
    instruments = guarded(instrument)
    cache = make_cache(make or _maker(rebuild), llm, cache_settings, policy, instruments)
    try:
        readings, trigger = _sensing(llm, source)
    except BaseException:
        cache.close()
        raise
    sharing = open_sharing(share) if source is None or share is not None else None
    governor = Governor(
        cache,
        readings,
        settings=settings,
        adapt=adapt,
        instrument=instruments,
        trigger=trigger,
        monitor=monitor,
        sharing=sharing,
    )
    governed = GovernedLlama(llm, cache, governor)
    try:
        governed._attach()
        governed.set_cache_limit(most)
        governor.start()
        if adapt_threads:
            governed._govern_cpu()
    except BaseException:
        governed.close()
        raise
    with _registry_lock:
        _registry.add(governed)
    return governed


def govern_with(make: MakeCache, llm: llama_cpp.Llama, **options: Any) -> GovernedLlama:
    """`govern` with its argument ``make`` first."""
    return govern(llm, make=make, **options)


def _refuse_ungovernable(llm: llama_cpp.Llama) -> None:
    if not isinstance(llm, llama_cpp.Llama):
        raise UsageError(
            f"govern needs a llama_cpp.Llama, not {type(llm).__name__}; load the model with llama_cpp first."
        )
    if not llm.ctx:
        raise UsageError("This model is closed; load it again before it is governed.")
    with _registry_lock:
        if any(g.llm is llm for g in _registry):
            raise UsageError("This model is governed already; close that first or use the object it returned.")


def _maker(rebuild: bool | RebuildSettings) -> MakeCache:
    if isinstance(rebuild, RebuildSettings):
        return functools.partial(make_elastic_or_rebuilt, pace=rebuild)
    return make_elastic_or_rebuilt if rebuild else make_elastic


def _sensing(llm: llama_cpp.Llama, source: PressureSource | None) -> tuple[PressureSource, Trigger | None]:
    """The given source, which gets no trigger, or this machine's kernel with the best trigger there is."""
    if source is not None:
        return source, None
    return best_sensing(int(llama_cpp.llama_model_size(llm.model)))


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
