"""When a rebuilt context changes its size, and which tokens it forgets for that."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator

import llama_cpp

from kvpsi.errors import LayoutError
from kvpsi.instrument import Instrument
from kvpsi.kv.gated import CacheSettings, Forgotten, GatedCache, Trim, exclusive
from kvpsi.kv.layout import refuse_unsupported
from kvpsi.kv.rebuild.context import ONLY_SEQUENCE, ContextHolder, Rebuild, RebuiltContext
from kvpsi.kv.rebuild.probe import least_cells, measure_cell
from kvpsi.kv.rebuild.sequence import OneSequence
from kvpsi.kv.rebuild.sizes import RebuildSettings, Sizes, larger_cells, reachable_cells, round_up, smaller_cells
from kvpsi.kv.tracker import NOTHING

log = logging.getLogger("kvpsi")


class ResizedCache(GatedCache):
    """Base of `RebuiltCache`, which describes the arguments: it knows the sizes, and resizes, but decodes nothing."""

    def __init__(
        self,
        holder: ContextHolder,
        *,
        settings: CacheSettings | None = None,
        pace: RebuildSettings | None = None,
        instrument: Instrument | None = None,
        on_forgotten: Callable[[Forgotten], None] | None = None,
        equip: Callable[[llama_cpp.llama_context_p], bool] = lambda _: True,
        on_rebuilt: Callable[[bool], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        ctx = holder.ctx
        refuse_unsupported(ctx)
        if int(llama_cpp.llama_n_seq_max(ctx)) > 1:
            raise LayoutError("This context serves several sequences, but rebuilding carries only one over.")
        self.pace = pace or RebuildSettings()
        self._bytes_per_cell = measure_cell(ctx)
        self.holder = holder
        self._sequence = OneSequence(holder)
        self._context = RebuiltContext(holder, equip, _telling(self._sequence, on_rebuilt), clock)
        self._n_cells = self._context.cells
        self._n_ubatch = self._context.n_ubatch
        self._n_swa = int(llama_cpp.llama_model_n_swa(holder.model.model))
        self._least_cells = least_cells(holder.model.model, self._n_cells)
        super().__init__(settings, instrument, on_forgotten)
        self._clock = clock
        self._rebuilt_at_s = clock() - self.pace.min_interval_s
        self._grow_from_s = clock()  # not before, after no memory was found

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def ctx(self) -> llama_cpp.llama_context_p:
        """The context as it is now; None where it could not be made again."""
        return self.holder.ctx

    @property
    def n_cells(self) -> int:
        """Cells of the context at first."""
        return self._n_cells

    @property
    def used_cells(self) -> int:
        """Cells that hold a token."""
        return len(self._sequence.held)

    @property
    def committed_cells(self) -> int:
        """Cells of the context now."""
        return self._context.cells

    @property
    def bytes_per_cell(self) -> int:
        """What one more cell adds to a saved state: K and V of all layers, and a few bytes to tell its position."""
        return self._bytes_per_cell

    @property
    def capacity_bytes(self) -> int:
        """Size of the cache at first."""
        return self.n_cells * self.bytes_per_cell

    @property
    def floor_cells(self) -> int:
        """The protected tokens and room for one eviction, rounded up to a size that a context can have."""
        wanted = self.settings.keep + self._tail + self.settings.min_prune
        return min(max(round_up(wanted), self._least_cells), self.n_cells)

    def resident_bytes(self) -> int:
        """Bytes of the cache: llama.cpp writes all of it when the context is made. Not the kernel's count."""
        return self.committed_cells * self.bytes_per_cell

    def first_gap(self, seq_id: int) -> int:  # noqa: ARG002 - there is one sequence only
        """First position that the sequence has lost (or not reached yet)."""
        return self._sequence.held.gap

    @property
    def _needed_cells(self) -> int:
        """The least size that holds the tokens in use."""
        return max(round_up(self.used_cells), self.floor_cells)

    def _sizes(self) -> Sizes:
        return Sizes(
            n_cells=self.n_cells,
            floor_cells=self.floor_cells,
            step_cells=self.pace.step_cells(self.n_cells),
            committed_cells=self.committed_cells,
            used_cells=self.used_cells,
            limit_cells=self.limit_cells,
            cap_cells=self.cap_cells,
        )

    # -- the gate and eviction -----------------------------------------------------------------------------------

    def _have_cells(self, n_tokens: int) -> None:
        """Grow, else evict, until so many tokens more fit."""
        if self.used_cells + n_tokens > self.committed_cells:
            self._grow(self.used_cells + n_tokens)
        missing = self.used_cells + n_tokens - self.committed_cells
        if missing <= 0 or self.committed_cells == self.n_cells or not self.trusted:
            return  # a cache that is full of its own accord is llama.cpp's to refuse
        trim = self.evict(max(missing, self.settings.min_prune))
        if trim.freed_cells < missing:
            raise self._refuse(n_tokens, missing - trim.freed_cells)

    def _ask_to_replace(self, n_tokens: int) -> None:
        """Raise CacheRefusedError unless so many tokens could be had in place of those that are held."""
        emptied = dataclasses.replace(self._sizes(), used_cells=0)
        most = emptied.fitting(min(emptied.committed_cells, emptied.allowed_cells))
        if self._can_grow():
            most = max(most, reachable_cells(emptied))
        if n_tokens > most:
            raise self._refuse(n_tokens, n_tokens - most)

    @exclusive
    def evict(self, n_cells: int) -> Trim:
        """Forget the oldest ``n_cells`` tokens that may go, fewer if not so many may. The context keeps its size."""
        self._revive()
        freed = 0
        chosen = self._sequence.held.between(self.settings.keep, self._tail, n_cells) if self.trusted else []
        for first, end in chosen:
            if self._sequence.remove(ONLY_SEQUENCE, first, end):
                freed += end - first
                if self.on_forgotten:
                    self.on_forgotten(Forgotten(ONLY_SEQUENCE, first, end, end - first))
        trim = Trim(n_cells, freed, NOTHING)
        if freed:
            self.trims += 1
            self.forgotten_cells += freed
            self.instrument.event("trim", trim)
        return trim

    # -- resizing ------------------------------------------------------------------------------------------------

    def _shrink_if_due(self) -> Rebuild | None:
        too_soon = self._clock() - self._rebuilt_at_s < self.pace.min_interval_s
        target = smaller_cells(self._sizes(), too_soon=too_soon)
        if target is None or not self._can_rebuild():
            return None
        if self.used_cells > target:
            self.evict(self.used_cells - target)
        target = max(target, round_up(self.used_cells))
        return self._rebuild(target) if target < self.committed_cells else None

    def _reachable_cells(self) -> int:
        """The size to which the context could grow now."""
        return reachable_cells(self._sizes()) if self._can_grow() else self.committed_cells

    def _can_grow(self) -> bool:
        return self._clock() >= self._grow_from_s and self._can_rebuild()

    def _grow(self, cells: int) -> None:
        target = larger_cells(self._sizes(), cells) if self._can_grow() else self.committed_cells
        if target > self.committed_cells:
            self._rebuild(target)

    def _can_rebuild(self) -> bool:
        if not self.trusted or self._sequence.shift_pending:
            return False
        if self._sequence.changed_elsewhere():
            self._distrust("the sequence was changed without going through kvpsi")
        return self.trusted

    def _rebuild(self, wanted: int) -> Rebuild | None:
        """Resize, or go back to the size before; None if there is no memory for the copy and nothing was done.

        Raises:
            RebuildError: there is no context now, or it has lost its tokens.
        """
        self._rebuilt_at_s = self._clock()
        with self._replacing():
            done = self._context.resize(wanted, self._needed_cells)
        if done is None:
            self._grow_from_s = self._rebuilt_at_s + self.pace.min_interval_s
            return None
        self._rebuilt_at_s = self._clock()
        if done.to_cells < done.from_cells:
            self.releases += 1
            self.returned_bytes += done.returned_bytes
        if done.to_cells != wanted:
            self._grow_from_s = self._rebuilt_at_s + self.pace.min_interval_s
            log.warning("kvpsi: no memory for a context of %d cells, so it stays at %d.", wanted, done.to_cells)
        self.instrument.event("rebuild", done)
        return done

    def _revive(self) -> None:
        """Try again to make a context that could not be made."""
        if not self.ctx:
            with self._replacing():
                self._context.revive(self._needed_cells)

    @contextlib.contextmanager
    def _replacing(self) -> Iterator[None]:
        try:
            yield
        finally:  # also when the tokens are lost, as there is a new context then
            self._n_ubatch = self._context.n_ubatch

    def _distrust(self, reason: str) -> None:
        if self.distrust_reason is None:
            self.distrust_reason = reason
            log.warning("kvpsi stops resizing until the cache is cleared: %s.", reason)
            self.instrument.event("distrust", reason)


def _telling(sequence: OneSequence, on_rebuilt: Callable[[bool], None]) -> Callable[[bool], None]:
    """What the context calls when it was made again; not a method, or cache and context would keep each other alive."""

    def rebuilt(kept: bool) -> None:
        if not kept:
            sequence.lost()
        on_rebuilt(kept)

    return rebuilt
