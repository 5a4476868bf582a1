"""A llama.cpp context whose KV cache gives memory back: every change to the cache goes through here.

Call these methods instead of the `llama_cpp` functions of the same name, from one thread (the engine's). Other
threads may call what a governor needs (`kvpsi.governor.Governed`), which waits for nobody.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import mmap
from collections.abc import Callable, Sequence
from dataclasses import replace

import llama_cpp
import numpy as np
import numpy.typing as npt

from kvpsi.errors import LayoutError, UsageError
from kvpsi.instrument import Instrument
from kvpsi.kv import pages
from kvpsi.kv.cells import UNKNOWN_TOKEN, IntArray, StreamCells
from kvpsi.kv.gated import (
    DECODE_ABORTED,
    DECODE_INVALID,
    DECODE_NO_ROOM,
    DECODE_OK,
    CacheSettings,
    Forgotten,
    GatedCache,
    Trim,
    exclusive,
)
from kvpsi.kv.keys import Keys
from kvpsi.kv.layout import Section, discover, seq_state_apart
from kvpsi.kv.policies import Auto, EvictionPolicy
from kvpsi.kv.policies.base import CellView, view_of
from kvpsi.kv.questions import Question, Questions
from kvpsi.kv.run import Plans, Run, open_run
from kvpsi.kv.statedata import SectionState, StateBytes, address_of, parse_state
from kvpsi.kv.tracker import NOTHING, KeyRows, Micro, Release, SectionTracker
from kvpsi.kv.turns import that_must_stay
from kvpsi.kv.ubatch import Tokens, read_batch, split_equal, split_simple
from kvpsi.kv.vocabulary import Vocabulary
from kvpsi.status import CacheStatus

log = logging.getLogger("kvpsi")

_MOST_PAIRS = 1 << 20
_LEAST_PIECE_TOKENS = 128
_SCORE_AT_ONCE_S, _SCORE_A_DECODE_S = 0.012, 0.004

IntArray64 = npt.NDArray[np.int64]


class ElasticCache(GatedCache):
    """Elastic memory for one llama.cpp context.

    The context must be empty. ``limit_cells`` is the allocation gate: before new cells are taken the policy evicts
    until they fit below it, and if it cannot, `CacheRefusedError` is raised and nothing has changed.

    Raises:
        LayoutError: the context's cache is of a kind that is left alone (see `kvpsi.kv.layout.discover`).
    """

    mode = "pages"

    def __init__(
        self,
        ctx: llama_cpp.llama_context_p,
        *,
        settings: CacheSettings | None = None,
        policy: EvictionPolicy | None = None,
        instrument: Instrument | None = None,
        on_forgotten: Callable[[Forgotten], None] | None = None,
        questions: Questions | None = None,
    ) -> None:
        self.ctx = ctx
        self.policy = policy or Auto()
        self._memory = llama_cpp.llama_get_memory(ctx)
        self._n_seq = int(llama_cpp.llama_n_seq_max(ctx))
        self._n_ubatch = int(llama_cpp.llama_n_ubatch(ctx))
        sections = discover(ctx)
        self.trackers = [SectionTracker(s, self._n_seq) for s in sections]
        self._n_swa = max(s.n_swa for s in sections)
        self._vocabulary = Vocabulary(ctx)
        self._keys = _keys_of(ctx, sections)
        self.questions = (
            questions if self._keys and questions is not None and questions.attach(ctx, self._vocabulary) else None
        )
        self._decodes = 0
        self._used_at = np.zeros(self._n_seq, dtype=np.int64)
        self._n_cells = sections[0].n_cells * sections[0].n_stream
        super().__init__(settings, instrument, on_forgotten)
        self._held = np.zeros(self._n_seq, dtype=np.int64)  # cells that each sequence sees
        self._in_turns = np.zeros(self._n_seq, dtype=np.int64)  # of these, in turns that must stay
        self._protected = self._protected_of(self._held)
        self._loading_cells = 0
        self._before_eviction: tuple[int, int] | None = None
        self._rewritten = False  # a key shift or stream copy waits for the next decode, which writes everywhere
        self._copying = False
        self._closed = False
        self._run: Run | None = None
        self._settling = False
        self.release_slack()

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def n_cells(self) -> int:
        """Cells of the (non-sliding) cache over all streams."""
        return self._n_cells

    @property
    def used_cells(self) -> int:
        """Cells that hold a token."""
        run = self._run  # the count at its opening, as another thread may look while it is being recorded
        held = run.used_before + len(run.taken) if run else self.trackers[0].mirror.used
        return held + self._loading_cells

    @property
    def committed_cells(self) -> int:
        """Cells whose memory is not available to others: those in use, as the pages of all others went back."""
        return self.used_cells

    @property
    def bytes_per_cell(self) -> int:
        """Bytes that one more cell costs, K and V of all layers."""
        return self.trackers[0].section.bytes_per_cell

    @property
    def capacity_bytes(self) -> int:
        """Size of the whole cache, which stock llama.cpp keeps committed."""
        return sum(t.section.n_bytes for t in self.trackers)

    @property
    def floor_cells(self) -> int:
        """Below this the cache cannot shrink: the protected tokens of the sequences that there are, of one at least,
        and room for one eviction. Cells that several sequences share count for each of them."""
        wanted = self._protected_cells + self.settings.min_prune + self.block_cells
        return min(wanted, self.n_cells)

    @property
    def block_cells(self) -> int:
        """Evictions take whole blocks of this many cells, so that whole pages become free."""
        return self.trackers[0].section.block_cells

    @property
    def _protected_cells(self) -> int:
        return self._protected  # counted by the engine's thread: any other may read it

    def _protected_of(self, held: IntArray64) -> int:
        """Cells that cannot go while sequence s holds ``held[s]`` of them; one whole sequence at least."""
        least = self.settings.keep + self._tail
        return max(least, int(np.minimum(held, least + self._in_turns).sum()))

    def _count_held(self) -> None:
        """Count anew what the sequences hold, after any of them lost something or was copied."""
        streams = self.trackers[0].mirror.streams
        self._held = np.sum([np.count_nonzero(s.owner, axis=0) for s in streams], axis=0, dtype=np.int64)
        self._count_turns(np.arange(self._n_seq))
        self._protected = self._protected_of(self._held)

    def held_cells(self, seq_id: int) -> int:
        """Cells that a sequence sees; callable from any thread."""
        return int(self._held[seq_id])

    def _count_turns(self, sequences: npt.NDArray[np.intp]) -> None:
        """Count anew what these sequences hold of turns that must stay."""
        for seq_id in sequences.tolist():
            if not self._held[seq_id]:
                self._in_turns[seq_id] = 0
                continue
            cells = self.trackers[0].mirror.stream_of(seq_id)
            mine = cells.cells_of(seq_id)
            token = cells.token[mine[np.argsort(cells.pos[mine], kind="stable")]]
            stays = that_must_stay(self._vocabulary.ends_turn(token), self.settings.turn)
            stays[: self.settings.keep] = False
            self._in_turns[seq_id] = int(stays.sum())

    @exclusive
    def first_gap(self, seq_id: int) -> int:
        """First position that a sequence has lost (or not reached yet): what is before it is complete."""
        stream = self.trackers[0].mirror.stream_of(seq_id)
        held = np.sort(stream.pos[stream.owner[:, seq_id]])
        missing = np.flatnonzero(held != np.arange(held.size))
        return int(missing[0]) if missing.size else int(held.size)

    @property
    def may_be_cut(self) -> bool:
        """Whether a sequence can go on after its end was removed: a sliding window has lost what comes before."""
        return self.trusted and not self._n_swa

    @exclusive
    def positions(self, seq_id: int) -> list[int]:
        """Those that a sequence holds, in order."""
        stream = self.trackers[0].mirror.stream_of(seq_id)
        return [int(p) for p in np.sort(stream.pos[stream.owner[:, seq_id]])]

    def resident_bytes(self) -> int:
        """Bytes of the cache that are in memory, as the kernel counts them (smaps)."""
        return pages.resident_bytes([t.inner for t in self.trackers])[0]

    # -- what a governor needs, from any thread -------------------------------------------------------------------

    def status(self) -> CacheStatus:
        """Capacity, bytes in use and floor, for the control law."""
        per_cell = self.bytes_per_cell  # without sliding windows: what they hold cannot be given
        used_cells, forgotten_cells = self._used_and_forgotten()
        return CacheStatus(
            self.n_cells * per_cell,
            used_cells * per_cell,
            self.floor_cells * per_cell,
            self.returned_bytes,
            self._loading_cells * per_cell,
            forgotten_bytes=forgotten_cells * per_cell,
        )

    def _used_and_forgotten(self) -> tuple[int, int]:
        """Both of the same moment: what they were before an eviction as long as it lasts."""
        while True:
            shown = self._before_eviction
            if shown is not None:
                return shown
            forgotten = self.forgotten_cells
            used = self.used_cells
            if self._before_eviction is None and self.forgotten_cells == forgotten:
                return used, forgotten

    def give_now(self) -> int | None:
        """Shrink to the limit if the engine is idle; the bytes given, None if it is busy."""
        if not self._busy.acquire(blocking=False):
            return None
        try:
            excess = 0 if self._closed else self.used_cells - self.allowed_cells
            before = self.returned_bytes
            if excess > 0:
                self._settle()
                self.ladder.give(excess * self.bytes_per_cell)
            return self.returned_bytes - before
        finally:
            self._busy.release()

    # -- decoding ------------------------------------------------------------------------------------------------

    def _next_pos(self, batch: llama_cpp.llama_batch) -> int:
        return 0 if batch.pos else self.trackers[0].mirror.stream_of(0).pos_max(0) + 1

    def most_at_once(self) -> int:
        """Shorter pieces the more there is to attend to: a decode that is to stop does so between two nodes of its
        graph, and the longest of them takes time in proportion to both, shared by the threads."""
        n_threads = int(llama_cpp.llama_n_threads_batch(self.ctx))
        return min(super().most_at_once(), piece_at_depth(self.used_cells, n_threads))

    @property
    def _gate(self) -> tuple[int, int]:
        return self.limit_cells, self.cap_cells

    def decode(
        self, batch: llama_cpp.llama_batch, *, divisible: bool = False, return_when_stopped: bool = False
    ) -> int:
        """`llama_decode`, through the allocation gate; see `GatedCache.decode`."""
        with self._busy:
            self._score_questions_if_short()
            run = self._run
            if run is not None and batch.n_tokens == 1 and run.gate == self._gate:
                token = run.next(batch)
                if token is not None:
                    code = self._decode_next(run, batch, token)
                    if code != DECODE_ABORTED:
                        return code
                    self._note_interrupt(1)
                    if return_when_stopped:
                        return code
            return super().decode(batch, divisible=divisible, return_when_stopped=return_when_stopped)

    def _decode_next(
        self, run: Run, batch: llama_cpp.llama_batch, token: tuple[int, int], *, stoppable: bool = True
    ) -> int:
        """One more token of a run: where it goes is known, and nothing else needs to be known until the run ends."""
        try:
            with self._computing(self.ctx, stoppable):
                code = int(llama_cpp.llama_decode(self.ctx, batch))
            if code == DECODE_OK:
                run.add(token)
        except BaseException:
            if self._last_pos(run.seq_id) == token[1]:  # Ctrl-C came after llama.cpp had done it
                run.add(token)
            self._settle()
            self._broken_off()
            raise
        if code != DECODE_OK:
            self._settle()
            tokens = read_batch(batch, 0)
            micro = self._split(tokens)
            self._record(code, tokens, micro, [t.plan(tokens, micro) for t in self.trackers], [])
        return code

    def _settle(self) -> None:
        """End the run: check that all its tokens went where they had to, and record them."""
        run = self._run
        if run is None or self._settling:  # a listener that hears of a failure may ask for more
            return
        self._settling = True
        try:
            if run.taken:
                self._commit(*run.record())
        finally:
            self._run, self._settling = None, False
        self._note_peak()

    def _decode_piece(self, batch: llama_cpp.llama_batch, tokens: Tokens, stoppable: bool) -> int:
        if len(tokens) == 1 and self.trusted and not self._rewritten:
            run = open_run(self.trackers, tokens.seqs[0], self._gate, self._room_cells())
            token = run.next(batch) if run else None
            if run and token:
                self._run = run
                return self._decode_next(run, batch, token, stoppable=stoppable)
        with self._reading_questions(batch, tokens):
            return self._decode_tokens(batch, tokens, stoppable)

    def _decode_tokens(self, batch: llama_cpp.llama_batch, tokens: Tokens, stoppable: bool) -> int:
        micro = self._split(tokens)
        plans = [t.plan(tokens, micro) for t in self.trackers] if self.trusted else []
        if len(self.trackers) > 1 and any(p is None for p in plans):
            # a sliding-window model tries a second way of splitting before it gives up
            micro = split_equal(tokens, self._n_ubatch, streams=False)
            plans = [t.plan(tokens, micro) for t in self.trackers]
        before = [t.key_rows(p or []) for t, p in zip(self.trackers, plans, strict=False)]
        code = None
        try:
            with self._computing(self.ctx, stoppable and self.trusted and len(micro) == 1):
                code = int(llama_cpp.llama_decode(self.ctx, batch))
        finally:
            if code is None and self._holds(tokens):  # Ctrl-C came after llama.cpp had done it
                code = DECODE_OK
            if code is not None:
                self._note(code, tokens, micro, plans, before)
        return code

    def _note(self, code: int, tokens: Tokens, micro: Micro, plans: Plans, before: list[KeyRows]) -> None:
        """Take note of a decode that has ended with this code."""
        if self.trusted:
            self._record(code, tokens, micro, plans, before)
        if self._rewritten and code != DECODE_INVALID:
            self._rewritten = self._copying = False
            for tracker in self.trackers:
                tracker.touch_all()
            self.release_slack()

    def _record(self, code: int, tokens: Tokens, micro: Micro, plans: Plans, before: list[KeyRows]) -> None:
        """Bring the mirrors up to date with what the decode did."""
        if code == DECODE_OK:
            self._commit(tokens, plans, before)
            return
        if code == DECODE_ABORTED and len(micro) == 1:
            self._undo(tokens, plans)
        elif code == DECODE_NO_ROOM and plans[0] is None:
            pass  # foreseen; llama.cpp asks this cache first, so that nothing has changed in a sliding window's either
        elif code != DECODE_INVALID:
            self._distrust(f"llama_decode returned {code}, after which the cells in use are not known")
        self._count_held()

    def _broken_off(self) -> None:
        if self.trusted:
            self._agrees()

    def _last_pos(self, seq_id: int) -> int:
        return int(llama_cpp.llama_memory_seq_pos_max(self._memory, seq_id))

    def _holds(self, tokens: Tokens) -> bool:
        """Whether llama.cpp holds each sequence up to the last of these tokens."""
        last: dict[int, int] = {}
        for seqs, pos in zip(tokens.seqs, tokens.pos.tolist(), strict=True):
            for seq_id in seqs:
                last[seq_id] = max(last.get(seq_id, -1), pos)
        return all(self._last_pos(seq_id) == pos for seq_id, pos in last.items())

    def _split(self, tokens: Tokens) -> Micro:
        if self.trackers[0].mirror.n_stream > 1:
            return split_equal(tokens, self._n_ubatch, streams=True)
        return split_simple(tokens, self._n_ubatch)

    def _commit(self, tokens: Tokens, plans: Plans, before: list[KeyRows]) -> None:
        foreseen = [p for p in plans if p is not None]
        if len(foreseen) < len(plans):
            self._distrust("llama.cpp found room where none was foreseen")
            return
        for tracker, plan, rows in zip(self.trackers, foreseen, before, strict=True):
            if not tracker.all_written(tokens, plan, rows):
                self._distrust("a token did not go to the cell that was predicted for it")
                return
        for tracker, plan in zip(self.trackers, foreseen, strict=True):
            for placements in plan:
                tracker.commit(tokens, placements)
        seqs = np.fromiter((s for each in tokens.seqs for s in each), dtype=np.intp)
        self._decodes += 1
        self._used_at[seqs] = self._decodes
        self._held = self._held + np.bincount(seqs, minlength=self._n_seq)
        if self._vocabulary.ends_turn(tokens.token).any():
            self._count_turns(np.unique(seqs))
        self._protected = self._protected_of(self._held)

    def _undo(self, tokens: Tokens, plans: Plans) -> None:
        """After an abort llama.cpp removes the micro-batch's positions, from its first one on, from its sequences."""
        for tracker, plan in zip(self.trackers, plans, strict=True):
            if plan is None:
                self._distrust("llama.cpp found room where none was foreseen")
                return
            tracker.commit(tokens, plan[0])
            first: dict[int, int] = {}
            for seqs, pos in zip(tokens.seqs, tokens.pos, strict=True):
                first[seqs[0]] = min(first.get(seqs[0], int(pos)), int(pos))
            for seq_id in sorted(first):
                tracker.mirror.stream_of(seq_id).seq_rm(seq_id, first[seq_id], -1)

    # -- the same operations as llama.cpp's ----------------------------------------------------------------------

    @exclusive
    def clear(self) -> None:
        """`llama_memory_clear` with the data: all pages go back instead of being overwritten with zeros."""
        llama_cpp.llama_memory_clear(self._memory, False)
        for tracker in self.trackers:
            tracker.mirror.clear()
            if self.distrust_reason is not None:
                tracker.touch_all()
                tracker.mirror.forget_bytes()
        self._count_held()
        self._lose_questions(-1)
        self.distrust_reason = None
        self._rewritten = self._copying  # a stream copy is made all the same, into cells that nobody needs
        self._copying = False
        self.release_slack()

    def seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """`llama_memory_seq_rm`."""
        with self._busy:
            if self._run is not None and p0 > self._run.last_pos:
                # Llama.eval removes what is not there before every token, for which llama.cpp looks at every cell
                last = self._last_pos(seq_id) if seq_id >= 0 else p0
                return p0 > last or bool(llama_cpp.llama_memory_seq_rm(self._memory, seq_id, p0, p1))
            self._settle()
            if not self.trusted and p0 <= 0 and p1 < 0 and self._is_alone(seq_id):
                self.clear()  # what is known for certain again
                return True
            done = bool(llama_cpp.llama_memory_seq_rm(self._memory, seq_id, p0, p1))
            if done:
                self._each_stream(seq_id, lambda s: s.seq_rm(seq_id, p0, p1))
                if p1 < 0:
                    self._lose_questions(seq_id, p0)
                self._release_if_worthwhile()
            return done

    @exclusive
    def seq_keep(self, seq_id: int) -> None:
        """`llama_memory_seq_keep`."""
        llama_cpp.llama_memory_seq_keep(self._memory, seq_id)
        self._each_stream(seq_id, lambda s: s.seq_keep(seq_id))
        self._release_if_worthwhile()

    @exclusive
    def seq_cp(self, src: int, dst: int, p0: int, p1: int) -> None:
        """`llama_memory_seq_cp`; between streams llama.cpp copies the bytes at the next decode.

        Raises:
            UsageError: part of a sequence is to be copied to another stream, for which llama.cpp ends the process.
        """
        mirror = self.trackers[0].mirror
        across = mirror.stream_of(src) is not mirror.stream_of(dst)
        if across and any(0 < p < mirror.n_cells - 1 for p in (p0, p1)):
            raise UsageError("Between streams only whole sequences can be copied: leave p0 and p1 at -1.")
        llama_cpp.llama_memory_seq_cp(self._memory, src, dst, p0, p1)
        for tracker in self.trackers:
            source, target = tracker.mirror.stream_of(src), tracker.mirror.stream_of(dst)
            if source is target:
                source.seq_share(src, dst, p0, p1)
            else:
                target.copy_from(source, src, dst)
                self._rewritten = self._copying = True
        self._count_held()

    @exclusive
    def seq_add(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        """`llama_memory_seq_add`; llama.cpp rotates all keys at the next decode."""
        llama_cpp.llama_memory_seq_add(self._memory, seq_id, p0, p1, shift)
        self._each_stream(seq_id, lambda s: s.seq_add(seq_id, p0, p1, shift))
        self._lose_questions(seq_id)
        self._rewritten = True

    @exclusive
    def seq_div(self, seq_id: int, p0: int, p1: int, divisor: int) -> None:
        """`llama_memory_seq_div`; llama.cpp rotates all keys at the next decode."""
        llama_cpp.llama_memory_seq_div(self._memory, seq_id, p0, p1, divisor)
        self._each_stream(seq_id, lambda s: s.seq_div(seq_id, p0, p1, divisor))
        self._lose_questions(seq_id)
        self._rewritten = True

    @exclusive
    def save_sequence(self, seq_id: int) -> mmap.mmap:
        """`llama_state_seq_get_data` into memory of its own, which goes back to the system when it is closed.

        Raises:
            LayoutError: llama.cpp saved nothing.
        """
        return seq_state_apart(self.ctx, seq_id)

    @exclusive
    def load_sequence(self, state: StateBytes, seq_id: int) -> bool:
        """`llama_state_seq_set_data` of a sequence's saved state, through the gate. False if llama.cpp refused it.

        Raises:
            CacheRefusedError: the state's cells do not fit below the limit in place of what the sequence holds;
                nothing has changed.
            LayoutError: the bytes are not a sequence's state.
        """
        sections = parse_state(state)
        if len(sections) != len(self.trackers):
            raise LayoutError("The saved state is of a model with another kind of cache; save it again with this one.")
        loads = [_saved_tokens(section, seq_id) for section in sections]
        self._ask_to_replace(seq_id, len(loads[0]))
        self._drop(seq_id)
        self._evict_for(len(loads[0]))  # it was granted, whatever the limit is by now
        plans = [t.plan(tokens, [[np.arange(len(tokens))]]) for t, tokens in zip(self.trackers, loads, strict=True)]
        self._loading_cells = len(loads[0])  # a governor must not take them for free meanwhile
        try:
            return self._load(state, seq_id, sections, loads, plans)
        finally:
            self._loading_cells = 0
            self._count_held()

    def _load(
        self, state: StateBytes, seq_id: int, sections: list[SectionState], loads: list[Tokens], plans: Plans
    ) -> bool:
        """Have llama.cpp load a state, and look whether it went where it had to; False if llama.cpp refused it."""
        if not llama_cpp.llama_state_seq_set_data(self.ctx, address_of(state), len(state), seq_id):
            self._distrust("a saved state was refused, after which the cells in use are not known")
            return False
        for tracker, tokens, plan, section in zip(self.trackers, loads, plans, sections, strict=True):
            if plan is None:
                self._distrust("llama.cpp found room where none was foreseen")
            elif not tracker.all_loaded(plan, section):
                self._distrust("a saved state did not go to the cells that were predicted for it")
            elif len(tokens):
                tracker.commit(tokens, plan[0])
        return True

    @exclusive
    def note_tokens(self, seq_id: int, tokens: Sequence[int]) -> None:
        """Say which tokens a loaded sequence holds, from position 0 on: a saved state does not."""
        known = np.asarray(tokens, dtype=np.int32)
        for tracker in self.trackers:
            cells = tracker.mirror.stream_of(seq_id)
            mine = cells.cells_of(seq_id)
            mine = mine[(cells.token[mine] == UNKNOWN_TOKEN) & (cells.pos[mine] < len(known))]
            cells.token[mine] = known[cells.pos[mine]]
        self._count_held()

    def _ask_to_replace(self, seq_id: int, n_tokens: int) -> None:
        """Raise CacheRefusedError unless so many tokens could be had in place of what the sequence holds."""
        mirror = self.trackers[0].mirror
        without = copy.deepcopy(mirror.stream_of(seq_id))
        freed = len(without.seq_rm(seq_id, -1, -1))
        self._protected = self._protected_of(np.where(np.arange(self._n_seq) == seq_id, 0, self._held))
        streams = [without if s is mirror.stream_of(seq_id) else s for s in mirror.streams]
        try:
            self._refuse_unless(n_tokens, self._room_cells() + freed, streams)
        finally:
            self._protected = self._protected_of(self._held)

    def _drop(self, seq_id: int) -> None:
        """Take all from a sequence; if it is the only one, nothing at all is left, a pending shift neither."""
        if self.trusted and not np.delete(self._held, seq_id).any() and self._agrees():
            self.clear()
        else:
            self.seq_rm(seq_id, -1, -1)

    def _is_alone(self, seq_id: int) -> bool:
        """Whether llama.cpp holds no other sequence; -1 means all of them."""
        return seq_id < 0 or all(self._last_pos(s) < 0 for s in range(self._n_seq) if s != seq_id)

    def _each_stream(self, seq_id: int, change: Callable[[StreamCells], object]) -> None:
        for tracker in self.trackers:
            streams = tracker.mirror.streams if seq_id < 0 else [tracker.mirror.stream_of(seq_id)]
            for stream in streams:
                change(stream)
        self._count_held()

    # -- giving back ---------------------------------------------------------------------------------------------

    def _release_if_worthwhile(self) -> None:
        if any(t.slack_cells() >= t.section.block_cells for t in self.trackers):
            self.release_slack()

    @exclusive
    def release_slack(self) -> Release:
        """Give back the pages of all free cells. Does nothing while the cells are not known for certain."""
        if self._copying or not self.trusted or not self._agrees():
            return NOTHING
        done = NOTHING
        try:
            for tracker in self.trackers:
                done += tracker.release_slack()
        except OSError as error:
            self._distrust(f"the kernel would not take pages back ({error}); is the process's memory locked?")
        if done.requested_bytes:
            self.releases += 1
            self.returned_bytes += done.returned_bytes
            self.instrument.event("release", done)
        return done

    def _agrees(self) -> bool:
        """Whether llama.cpp's first and last position of each sequence are those of the mirror.

        Catches changes made behind this object's back before they could cost data.
        """
        mirror = self.trackers[-1].mirror
        present = np.logical_or.reduce([s.owner.any(axis=0) for s in mirror.streams])
        for seq_id in range(self._n_seq):
            stream = mirror.stream_of(seq_id)
            mine = (stream.pos_min(seq_id), stream.pos_max(seq_id)) if present[seq_id] else (-1, -1)
            first = int(llama_cpp.llama_memory_seq_pos_min(self._memory, seq_id))
            if (first, self._last_pos(seq_id)) != mine:
                self._distrust(f"sequence {seq_id} was changed without going through kvpsi")
                return False
        return True

    def _distrust(self, reason: str) -> None:
        if self.distrust_reason is None:
            self.distrust_reason = reason
            log.warning("kvpsi stops giving memory back until the cache is cleared: %s.", reason)
            self.instrument.event("distrust", reason)

    # -- the gate and eviction -----------------------------------------------------------------------------------

    def _room_cells(self) -> int:
        """Cells that may be taken before anything has to go."""
        if min(self._gate) >= self._n_cells or not self.trusted:
            return self._n_cells  # a cache that is full of its own accord is llama.cpp's to refuse
        return self.allowed_cells - self.used_cells

    def _make_room(self, n_tokens: int) -> None:
        self._refuse_unless(n_tokens, self._room_cells(), self.trackers[0].mirror.streams)
        still_missing = self._evict_for(n_tokens)
        if still_missing > 0:
            raise self._refuse(n_tokens, still_missing)

    def _evict_for(self, n_tokens: int) -> int:
        """Evict what so many tokens need; how many cells are missing all the same."""
        missing = n_tokens - self._room_cells()
        if missing <= 0 or not self.makes_room:
            return missing
        return missing - self.ladder.give(missing * self.bytes_per_cell) // self.bytes_per_cell

    def _refuse_unless(self, n_tokens: int, room: int, streams: Sequence[StreamCells]) -> None:
        """Raise CacheRefusedError unless so many tokens fit into the room and what may go from the streams."""
        missing = n_tokens - room
        if missing > 0:
            may_go = sum(self._may_go(streams)) if self.makes_room else 0
            if may_go < missing:
                raise self._refuse(n_tokens, missing - may_go)

    def _may_go(self, streams: Sequence[StreamCells]) -> list[int]:
        return [int(self._view(stream).evictable.sum()) for stream in streams]

    @exclusive
    def evict(self, n_cells: int) -> Trim:
        """Let the policy choose at least ``n_cells`` cells (in whole blocks or sentences; fewer if not so many may go),
        forget them and give their pages back. The streams of which most may go give first, down to what the others
        have."""
        self._before_eviction = self.used_cells, self.forgotten_cells
        try:
            return self._evict(n_cells)
        finally:
            self._before_eviction = None

    def _evict(self, n_cells: int) -> Trim:
        freed = 0
        streams = self.trackers[0].mirror.streams
        may_go = self._may_go(streams) if len(streams) > 1 else [n_cells]
        for stream, share in _shares(may_go, n_cells):
            if freed >= n_cells or not self.trusted:
                break
            freed += self._evict_from(stream, min(max(share, self.block_cells), n_cells - freed))
        trim = Trim(n_cells, freed, self.release_slack() if freed else NOTHING)
        if freed:
            self.trims += 1
            self.forgotten_cells += freed
            self.instrument.event("trim", trim)
        return trim

    def _evict_from(self, stream: int, n_cells: int) -> int:
        view = self._view_to_choose(stream)
        chosen = self.policy.choose(view, n_cells)
        chosen = chosen[view.evictable[chosen]]
        if not chosen.size:
            return 0
        used = self.used_cells
        self._forget(stream, chosen)
        self._count_held()
        return used - self.used_cells

    def _view(self, cells: StreamCells) -> CellView:
        return view_of(
            cells,
            keep=self.settings.keep,
            tail=self._tail,
            turn=self.settings.turn,
            block_cells=self.block_cells,
            vocabulary=self._vocabulary,
        )

    def _view_to_choose(self, stream: int) -> CellView:
        """A view with all that a policy may want to know."""
        cells = self.trackers[0].mirror.streams[stream]
        attention = None
        if self.questions is not None and self.policy.heeds_questions:
            if self.questions.unscored:
                self.score_questions(_SCORE_AT_ONCE_S)
            attention = self.questions.attention(cells.pos, self._sequences_of(stream))
        keys = self._keys[stream] if self._keys else None
        return replace(self._view(cells), used_at=self._used_at, keys=keys, attention=attention)

    # -- questions -----------------------------------------------------------------------------------------------

    def _reading_questions(
        self, batch: llama_cpp.llama_batch, tokens: Tokens
    ) -> contextlib.AbstractContextManager[None]:
        if self.questions is None or len(tokens) == 1 or not tokens.n_outputs or not self.policy.heeds_questions:
            return contextlib.nullcontext()
        outputs = np.zeros(len(tokens), dtype=np.bool_)
        if batch.logits:
            outputs |= np.ctypeslib.as_array(batch.logits, (len(tokens),)) != 0
        else:
            outputs[-1] = True
        return self.questions.reading(tokens, outputs)

    def question_of(self, seq_id: int) -> Question | None:
        """The pending question of a sequence, to be kept with its saved state."""
        return self.questions.of(seq_id) if self.questions is not None else None

    def resume_question(self, seq_id: int, question: Question | None) -> None:
        """A question is pending again, as its sequence was loaded, or is read again."""
        if self.questions is not None and question is not None:
            self.questions.resume(seq_id, question)

    def _lose_questions(self, seq_id: int, from_pos: int = 0) -> None:
        if self.questions is not None:
            self.questions.forget(seq_id, from_pos)

    def _sequences_of(self, stream: int) -> range:
        """The sequences whose cells lie in a stream."""
        n_stream = self.trackers[0].mirror.n_stream
        return range(self._n_seq) if n_stream == 1 else range(stream, stream + 1)

    def score_questions(self, budget_s: float) -> bool:
        """Go on for about so long with finding out what the pending questions attend to; whether all is known then."""
        if self.questions is None:
            return True
        for stream, cells in enumerate(self.trackers[0].mirror.streams):
            self.questions.advance(self._keys[stream], cells.pos, cells.owner, self._sequences_of(stream), budget_s)
        return not self.questions.unscored

    def _score_questions_if_short(self) -> None:
        """A little before each decode while memory is getting short, so that it is known when it is needed."""
        short = self.max_chunk_tokens is not None or min(self._gate) < self._n_cells
        if short and self.questions is not None and self.questions.unscored:
            self.score_questions(_SCORE_A_DECODE_S)

    def _forget(self, stream: int, chosen: IntArray) -> None:
        cells = self.trackers[0].mirror.streams[stream]
        owner, pos = cells.owner[chosen], cells.pos[chosen]
        for seq_id in np.flatnonzero(owner.any(axis=0)):
            mine = np.sort(pos[owner[:, seq_id]], kind="stable")  # fast, as they mostly are in order
            held = np.sort(cells.pos[cells.cells_of(int(seq_id))], kind="stable")
            for first, last in _ranges(mine, held):
                llama_cpp.llama_memory_seq_rm(self._memory, int(seq_id), first, last + 1)
                s, a, b = int(seq_id), first, last + 1
                for tracker in self.trackers:
                    tracker.mirror.stream_of(s).seq_rm(s, a, b)
                if self.on_forgotten:
                    taken = int(((mine >= a) & (mine < b)).sum())
                    self.on_forgotten(Forgotten(s, a, b, taken))

    def restore_capacity(self) -> None:
        """Nothing to do: the context is the one it always was, its pages come back as they are written."""

    @exclusive
    def close(self) -> None:
        """Let go of the context, which stays as it is and may be used without kvpsi."""
        self._closed = True
        for tracker in self.trackers:
            pages.set_apart(tracker.inner, False)


def piece_at_depth(used_cells: int, n_threads: int) -> int:
    """Most tokens of a piece that attends to so many cells, for a decode to stop in time (`most_at_once`)."""
    by_depth = _MOST_PAIRS * n_threads // max(1, used_cells)
    return 1 << max(_LEAST_PIECE_TOKENS, by_depth).bit_length() - 1  # no remainders, which are slow


def _shares(may_go: Sequence[int], n_cells: int) -> list[tuple[int, int]]:
    """What to take from each stream so that what may still go is level among them: (stream, cells), the fullest first.

    Together at least ``n_cells``, as far as so many may go.
    """
    fullest = sorted(range(len(may_go)), key=lambda stream: may_go[stream], reverse=True)
    heights = [may_go[stream] for stream in fullest]
    level, taken = 0, 0
    for n in range(1, len(heights) + 1):
        taken += heights[n - 1]
        level = max(0, (taken - n_cells) // n)
        if n == len(heights) or level >= heights[n]:
            break
    return [(stream, max(0, may_go[stream] - level)) for stream in fullest]


def _ranges(chosen: IntArray, held: IntArray) -> list[tuple[int, int]]:
    """First and last position of runs of ``chosen`` that are neighbours among the positions ``held``."""
    at = np.searchsorted(held, chosen)
    breaks = np.flatnonzero(np.diff(at) != 1)
    starts = np.concatenate([[0], breaks + 1])
    ends = np.concatenate([breaks, [len(chosen) - 1]])
    return [(int(chosen[a]), int(chosen[b])) for a, b in zip(starts, ends, strict=True)]


def _keys_of(ctx: llama_cpp.llama_context_p, sections: Sequence[Section]) -> list[Keys]:
    """The keys of each stream; none with a sliding window, whose layers are not all in one cache."""
    if len(sections) > 1:
        return []
    n_heads = int(llama_cpp.llama_model_n_head_kv(llama_cpp.llama_get_model(ctx)))
    (section,) = sections
    return [Keys(planes, section.key_type, n_heads, section.n_cells) for planes in section.keys]


def _saved_tokens(section: SectionState, seq_id: int) -> Tokens:
    """The cells of a saved sequence as a batch; which tokens they were is not saved."""
    n = len(section.positions)
    pos = np.array(section.positions, dtype=np.int32)
    return Tokens(np.full(n, UNKNOWN_TOKEN, dtype=np.int32), pos, [(seq_id,)] * n, 0)
