"""The mirror of llama.cpp's cell allocation against a naive reference written from llama.cpp's own rules."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpsi.kv.cells import EMPTY, CellMirror, StreamCells
from kvpsi.kv.layout import Plane, Section
from kvpsi.kv.pages import Mapping
from kvpsi.kv.tracker import SectionTracker
from kvpsi.kv.ubatch import Tokens, split_equal, split_simple

INT_MAX = 2**31 - 1


@dataclass
class Cell:
    pos: int = -1
    seqs: set[int] = field(default_factory=set)


class NaiveStream:
    """One stream as `llama_kv_cache` and `llama_kv_cells` keep it, cell by cell and slow."""

    def __init__(self, n_cells: int, n_swa: int) -> None:
        self.cells = [Cell() for _ in range(n_cells)]
        self.head = 0
        self.n_swa = n_swa

    def used(self) -> int:
        return sum(c.pos != -1 for c in self.cells)

    def positions(self, seq_id: int) -> list[int]:
        return [c.pos for c in self.cells if seq_id in c.seqs]

    def empty_cell(self, index: int) -> None:
        self.cells[index] = Cell()

    def find_slot(self, n_tokens: int) -> list[int] | None:
        head = self.head
        if head > self.used() + 2 * n_tokens:
            head = 0
        if n_tokens > len(self.cells):
            return None
        found: list[int] = []
        tested = 0
        while True:
            if head + 1 > len(self.cells):
                tested += len(self.cells) - head
                head = 0
                continue
            cell = self.cells[head]
            can_use = cell.pos == -1
            if not can_use and len(cell.seqs) == 1 and self.n_swa:
                newest = max(self.positions(next(iter(cell.seqs))))
                can_use = newest + 1 - cell.pos >= self.n_swa
            if can_use:
                found.append(head)
            head += 1
            tested += 1
            if len(found) == n_tokens:
                return found
            if tested >= len(self.cells):
                return None

    def apply(self, slots: list[int], pos: list[int], seqs: list[tuple[int, ...]]) -> None:
        overwritten: dict[int, int] = {}
        for slot, p, owners in zip(slots, pos, seqs, strict=True):
            old = self.cells[slot]
            if old.pos != -1:
                assert len(old.seqs) == 1
                (owner,) = old.seqs
                overwritten[owner] = max(overwritten.get(owner, -1), old.pos)
            self.cells[slot] = Cell(p, set(owners))
        for owner, newest in overwritten.items():
            oldest = min(self.positions(owner), default=-1)
            if oldest <= newest:
                self.seq_rm(owner, oldest, newest + 1)
        self.head = slots[-1] + 1

    def seq_rm(self, seq_id: int, p0: int, p1: int) -> list[int]:
        low, high = max(p0, 0), INT_MAX if p1 < 0 else p1
        freed = []
        for i, cell in enumerate(self.cells):
            if not low <= cell.pos < high:
                continue
            if seq_id < 0:
                cell.seqs.clear()
            elif seq_id in cell.seqs:
                cell.seqs.remove(seq_id)
            else:
                continue
            if not cell.seqs:
                self.empty_cell(i)
                freed.append(i)
        if freed and freed[0] < self.head:
            self.head = freed[0]
        return freed

    def seq_keep(self, seq_id: int) -> list[int]:
        freed = []
        for i, cell in enumerate(self.cells):
            if seq_id in cell.seqs:
                cell.seqs = {seq_id}
            elif cell.seqs:
                self.empty_cell(i)
                freed.append(i)
        if freed and freed[0] < self.head:
            self.head = freed[0]
        return freed

    def seq_cp(self, src: int, dst: int, p0: int, p1: int) -> None:
        low, high = max(p0, 0), INT_MAX if p1 < 0 else p1
        if src == dst:
            return
        for cell in self.cells:
            if low <= cell.pos < high and src in cell.seqs:
                cell.seqs.add(dst)

    def seq_add(self, seq_id: int, p0: int, p1: int, shift: int) -> list[int]:
        if shift == 0:
            return []
        low, high = max(p0, 0), INT_MAX if p1 < 0 else p1
        if low == high:
            return []
        freed = []
        for i, cell in enumerate(self.cells):
            if low <= cell.pos < high and seq_id in cell.seqs:
                cell.pos += shift
                if cell.pos < 0:
                    self.empty_cell(i)
                    freed.append(i)
        self.head = freed[0] if freed else 0
        return freed

    def seq_div(self, seq_id: int, p0: int, p1: int, divisor: int) -> None:
        low, high = max(p0, 0), INT_MAX if p1 < 0 else p1
        if divisor == 1 or low == high:
            return
        for cell in self.cells:
            if low <= cell.pos < high and seq_id in cell.seqs:
                cell.pos //= divisor

    def clear(self) -> None:
        self.cells = [Cell() for _ in self.cells]
        self.head = 0

    def become_copy(self, other: NaiveStream, src: int, dst: int) -> None:
        self.clear()
        for mine, theirs in zip(self.cells, other.cells, strict=True):
            if src in theirs.seqs:
                mine.pos, mine.seqs = theirs.pos, {dst}
        self.head = other.head


N_CELLS, N_SEQ = 24, 3
SEQ = st.integers(0, N_SEQ - 1)
BOUND = st.integers(-1, 2) | st.integers(-1, 40)


def assert_same(mirror: StreamCells, naive: NaiveStream) -> None:
    assert mirror.pos.tolist() == [c.pos for c in naive.cells]
    assert [set(np.flatnonzero(row).tolist()) for row in mirror.owner] == [c.seqs for c in naive.cells]
    assert mirror.head == naive.head
    assert mirror.used == naive.used()
    assert mirror.free().tolist() == [c.pos == -1 for c in naive.cells]
    for seq_id in range(N_SEQ):
        held = naive.positions(seq_id)
        assert mirror.pos_min(seq_id) == min(held, default=-1)
        assert mirror.pos_max(seq_id) == max(held, default=-1)
        assert mirror.cells_of(seq_id).tolist() == [i for i, c in enumerate(naive.cells) if seq_id in c.seqs]


class MirrorMachine(RuleBasedStateMachine):
    """Any allowed sequence of operations on a mirror and the reference: the same cells, owners, head and count."""

    n_stream = 1
    n_swa = 0

    @initialize()
    def begin(self) -> None:
        self.mirror = CellMirror(N_CELLS, self.n_stream, N_SEQ, n_swa=self.n_swa)
        self.naive = [NaiveStream(N_CELLS, self.n_swa) for _ in range(self.n_stream)]

    def pair(self, seq_id: int) -> tuple[StreamCells, NaiveStream]:
        return self.mirror.stream_of(seq_id), self.naive[0 if self.n_stream == 1 else seq_id]

    @rule(seq_id=SEQ, count=st.integers(1, N_CELLS + 2), others=st.sets(SEQ, max_size=2), gap=st.integers(0, 2))
    def place(self, seq_id: int, count: int, others: set[int], gap: int) -> None:
        cells, naive = self.pair(seq_id)
        owners = (seq_id,) if self.n_stream > 1 else (seq_id, *sorted(others - {seq_id}))
        found, expected = cells.find(count), naive.find_slot(count)
        assert (None if found is None else found.tolist()) == expected
        if found is None or expected is None:
            return
        first = 1 + gap + max(cells.pos_max(s) for s in owners)
        pos = list(range(first, first + count))
        tokens = np.arange(count, dtype=np.int32)
        cells.place(found, np.array(pos, dtype=np.int32), [owners] * count, tokens)
        naive.apply(expected, pos, [owners] * count)
        still = cells.pos[found] == np.array(pos)
        assert np.array_equal(cells.token[found][still], tokens[still])

    @rule(counts=st.lists(SEQ, min_size=1, max_size=12))
    def place_interleaved(self, counts: list[int]) -> None:
        if self.n_stream > 1:
            return
        cells, naive = self.pair(0)
        found, expected = cells.find(len(counts)), naive.find_slot(len(counts))
        assert (None if found is None else found.tolist()) == expected
        if found is None or expected is None:
            return
        following = [cells.pos_max(s) + 1 for s in range(N_SEQ)]
        pos = []
        for s in counts:
            pos.append(following[s])
            following[s] += 1
        cells.place(found, np.array(pos, dtype=np.int32), [(s,) for s in counts], np.array(counts, dtype=np.int32))
        naive.apply(expected, pos, [(s,) for s in counts])

    @rule(seq_id=SEQ, p0=BOUND, p1=BOUND)
    def remove(self, seq_id: int, p0: int, p1: int) -> None:
        cells, naive = self.pair(seq_id)
        assert cells.seq_rm(seq_id, p0, p1).tolist() == naive.seq_rm(seq_id, p0, p1)

    @rule(p0=BOUND, p1=BOUND)
    def remove_from_all(self, p0: int, p1: int) -> None:
        for cells, naive in zip(self.mirror.streams, self.naive, strict=True):
            assert cells.seq_rm(-1, p0, p1).tolist() == naive.seq_rm(-1, p0, p1)

    @rule(seq_id=SEQ)
    def keep(self, seq_id: int) -> None:
        cells, naive = self.pair(seq_id)
        assert cells.seq_keep(seq_id).tolist() == naive.seq_keep(seq_id)

    @rule(src=SEQ, dst=SEQ, p0=BOUND, p1=BOUND)
    def copy(self, src: int, dst: int, p0: int, p1: int) -> None:
        cells, naive = self.pair(src)
        if self.n_stream == 1:
            # as llama.cpp demands: no cell may get an owner that it has already
            self.remove(dst, -1, -1) if src != dst else None
            cells.seq_share(src, dst, p0, p1)
            naive.seq_cp(src, dst, p0, p1)
        elif src != dst:
            target, naive_target = self.pair(dst)
            target.copy_from(cells, src, dst)
            naive_target.become_copy(naive, src, dst)

    @rule(seq_id=SEQ, p0=BOUND, p1=BOUND, shift=st.integers(-15, 5))
    def add(self, seq_id: int, p0: int, p1: int, shift: int) -> None:
        cells, naive = self.pair(seq_id)
        assert cells.seq_add(seq_id, p0, p1, shift).tolist() == naive.seq_add(seq_id, p0, p1, shift)

    @rule(seq_id=SEQ, p0=BOUND, p1=BOUND, divisor=st.integers(1, 3))
    def divide(self, seq_id: int, p0: int, p1: int, divisor: int) -> None:
        cells, naive = self.pair(seq_id)
        cells.seq_div(seq_id, p0, p1, divisor)
        naive.seq_div(seq_id, p0, p1, divisor)

    @rule()
    def clear(self) -> None:
        self.mirror.clear()
        for naive in self.naive:
            naive.clear()

    @invariant()
    def same(self) -> None:
        if hasattr(self, "mirror"):
            for cells, naive in zip(self.mirror.streams, self.naive, strict=True):
                assert_same(cells, naive)
            assert self.mirror.used == sum(n.used() for n in self.naive)


class StreamsMachine(MirrorMachine):
    n_stream = N_SEQ


class WindowMachine(MirrorMachine):
    n_swa = 6


class WindowStreamsMachine(MirrorMachine):
    n_stream = N_SEQ
    n_swa = 6


@pytest.mark.parametrize("machine", [MirrorMachine, StreamsMachine, WindowMachine, WindowStreamsMachine])
def test_the_mirror_follows_llama_cpp(machine: type[MirrorMachine]) -> None:
    case = machine.TestCase
    case.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
    case("runTest").debug()


# -- single rules, spelled out ------------------------------------------------------------------------------------


def filled(n_cells: int, count: int, *, n_swa: int = 0, n_seq: int = 2) -> StreamCells:
    cells = StreamCells(n_cells, n_seq, n_swa=n_swa)
    found = cells.find(count)
    assert found is not None
    cells.place(found, np.arange(count, dtype=np.int32), [(0,)] * count, np.arange(count, dtype=np.int32))
    return cells


def test_a_hole_is_filled_before_the_end_grows() -> None:
    cells = filled(32, 20)
    assert cells.seq_rm(0, 5, 9).tolist() == [5, 6, 7, 8]
    assert cells.head == 5
    assert cells.find(6).tolist() == [5, 6, 7, 8, 20, 21]  # type: ignore[union-attr]


def test_the_search_begins_anew_where_much_is_free_before_the_head() -> None:
    cells = filled(32, 20)
    cells.seq_rm(0, 0, 18)
    cells.head = 20
    assert cells.find(1).tolist() == [0]  # type: ignore[union-attr]
    assert cells.find(9).tolist() == [*range(20, 29)]  # type: ignore[union-attr]


def test_no_room_is_none_and_changes_nothing() -> None:
    cells = filled(16, 12)
    before = copy.deepcopy(cells)
    assert cells.find(5) is None
    assert cells.find(17) is None
    assert cells.pos.tolist() == before.pos.tolist() and (cells.head, cells.used) == (before.head, before.used)


def test_a_shared_cell_is_free_only_when_nobody_sees_it_any_more() -> None:
    cells = filled(8, 4)
    cells.seq_share(0, 1, 0, 2)
    assert cells.seq_rm(0, -1, -1).tolist() == [2, 3]
    assert cells.seq_rm(1, -1, -1).tolist() == [0, 1]
    assert cells.used == 0


def test_a_sliding_window_never_takes_a_cell_that_two_sequences_see() -> None:
    cells = filled(8, 8, n_swa=3)
    cells.seq_share(0, 1, 0, 3)
    assert cells.find(3).tolist() == [3, 4, 5]  # type: ignore[union-attr]
    assert cells.find(4) is None


def test_overwriting_in_a_sliding_window_purges_all_that_is_older() -> None:
    cells = filled(8, 8, n_swa=3)
    cells.head = 4
    found = cells.find(1)
    assert found is not None and found.tolist() == [4]
    cells.place(found, np.array([8], dtype=np.int32), [(0,)], np.array([1], dtype=np.int32))
    assert cells.pos.tolist() == [EMPTY, EMPTY, EMPTY, EMPTY, 8, 5, 6, 7]
    assert (cells.used, cells.head) == (4, 5)


def test_an_empty_range_moves_nothing_not_even_the_head() -> None:
    cells = filled(16, 8)
    for p0, p1 in ((0, 0), (-1, 0), (5, 5)):
        assert cells.seq_add(0, p0, p1, 3).size == 0
        assert cells.head == 8


# -- cutting a batch ----------------------------------------------------------------------------------------------


def tokens_of(seqs: list[tuple[int, ...]]) -> Tokens:
    n = len(seqs)
    return Tokens(np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int32), seqs, 1)


def naive_split_equal(seqs: list[tuple[int, ...]], n_ubatch: int, sequential: bool) -> list[list[list[int]]]:
    """`llama_batch_allocr::split_equal`, token by token."""
    used = [False] * len(seqs)
    result: list[list[list[int]]] = []
    while True:
        chosen: list[set[int]] = []
        last = -1
        for i, owners in enumerate(seqs):
            if used[i]:
                continue
            add = not any(c & set(owners) for c in chosen)
            if sequential:
                add = add and (not chosen or owners[0] == last + 1)
            if add:
                chosen.append(set(owners))
                last = owners[0]
                if len(chosen) > n_ubatch:
                    break
        if not chosen:
            return result
        groups: list[list[int]] = [[] for _ in chosen]
        while True:
            following = []
            for mine in chosen:
                left = [i for i, owners in enumerate(seqs) if not used[i] and set(owners) == mine]
                following.append(left[0] if left else None)
            if any(f is None for f in following):
                break
            for group, index in zip(groups, following, strict=True):
                assert index is not None
                group.append(index)
                used[index] = True
            if (len(groups[0]) + 1) * len(chosen) > n_ubatch:
                break
        result.append(groups)


@given(st.integers(0, 50), st.integers(1, 20))
def test_split_simple_is_runs_of_the_batch(n: int, n_ubatch: int) -> None:
    cut = [index.tolist() for groups in split_simple(tokens_of([(0,)] * n), n_ubatch) for index in groups]
    assert [i for part in cut for i in part] == list(range(n))
    assert all(len(part) == n_ubatch for part in cut[:-1]) and all(0 < len(part) <= n_ubatch for part in cut)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 12))
def test_split_equal_for_streams(seqs: list[int], n_ubatch: int) -> None:
    owners = [(s,) for s in seqs]
    cut = [[g.tolist() for g in groups] for groups in split_equal(tokens_of(list(owners)), n_ubatch, streams=True)]
    assert cut == naive_split_equal(list(owners), n_ubatch, sequential=True)


@given(
    st.lists(st.sets(st.integers(0, 3), min_size=1, max_size=2).map(tuple), min_size=1, max_size=30),
    st.integers(1, 12),
)
def test_split_equal_for_unified_cells(seqs: list[tuple[int, ...]], n_ubatch: int) -> None:
    cut = [[i for g in groups for i in g.tolist()] for groups in split_equal(tokens_of(seqs), n_ubatch, streams=False)]
    assert cut == [[i for g in groups for i in g] for groups in naive_split_equal(seqs, n_ubatch, sequential=False)]
    assert sorted(i for part in cut for i in part) == list(range(len(seqs)))


# -- planning whole batches ---------------------------------------------------------------------------------------


class Fake:
    """A tracker over memory that nobody touches: enough for planning."""

    def __new__(cls, n_cells: int, n_stream: int, n_swa: int = 0) -> SectionTracker:  # type: ignore[misc]
        planes = tuple((Plane(0, 64),) for _ in range(n_stream))
        tracker = SectionTracker.__new__(SectionTracker)
        tracker.section = Section(n_cells, n_swa, planes, Mapping(0, 0))
        tracker.mirror = CellMirror(n_cells, n_stream, 4, n_swa=n_swa)
        tracker.touched = [np.zeros(n_cells, dtype=np.bool_) for _ in range(n_stream)]
        return tracker


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 9), st.booleans(), st.integers(0, 20))
def test_a_plan_never_uses_a_cell_twice_and_changes_nothing(
    seqs: list[int], n_ubatch: int, unified: bool, filled_cells: int
) -> None:
    tracker = Fake(24, 1 if unified else 4)
    naive = [NaiveStream(24, 0) for _ in range(1 if unified else 4)]
    for cells, reference in zip(tracker.mirror.streams, naive, strict=True):
        if filled_cells:
            slots = list(range(filled_cells))
            owners = [(0,) if unified else (tracker.mirror.streams.index(cells),)] * filled_cells
            cells.place(np.array(slots, dtype=np.int32), np.array(slots, dtype=np.int32), owners, np.array(slots))
            reference.apply(slots, slots, owners)
    tokens = tokens_of([(s,) for s in seqs])
    before = copy.deepcopy(tracker.mirror)
    for streams, micro in (
        (not unified, split_equal(tokens, n_ubatch, streams=not unified)),
        (False, split_simple(tokens, n_ubatch)),
    ):
        if not unified and not streams:
            continue
        plan = tracker.plan(tokens, micro)
        assert [s.pos.tolist() for s in tracker.mirror.streams] == [s.pos.tolist() for s in before.streams]
        if plan is None:
            assert unified is False or len(seqs) > 24 - filled_cells
            continue
        taken = [(p.stream, c) for placements in plan for p in placements for c in p.cells.tolist()]
        assert len(taken) == len(set(taken)) == len(seqs)
        assert all(tracker.mirror.streams[s].pos[c] == EMPTY for s, c in taken)
        expected = copy.deepcopy(naive)
        for groups, placements in zip(micro, plan, strict=True):
            if unified:
                index = [i for g in groups for i in g.tolist()]
                slots = expected[0].find_slot(len(index))
                assert slots == [c for p in placements for c in p.cells.tolist()]
                expected[0].apply(slots, index, [(seqs[i],) for i in index])
                continue
            for group, p in zip(groups, placements, strict=True):
                assert p.stream == seqs[group[0]]
                assert expected[p.stream].find_slot(len(group)) == p.cells.tolist()
                expected[p.stream].apply(p.cells.tolist(), group.tolist(), [(p.stream,)] * len(group))


@given(st.integers(25, 60))
def test_a_plan_that_does_not_fit_is_none(n: int) -> None:
    assume(n > 24)
    tokens = tokens_of([(0,)] * n)
    assert Fake(24, 1).plan(tokens, split_simple(tokens, 8)) is None
    assert Fake(24, 4).plan(tokens, split_equal(tokens, 8, streams=True)) is None


@pytest.mark.parametrize("n_stream", [1, 4])
def test_nothing_to_place_is_an_empty_plan(n_stream: int) -> None:
    tracker = Fake(24, n_stream)
    plan = tracker.plan(tokens_of([]), [[np.arange(0)]])
    assert plan is not None and sum(p.cells.size for placements in plan for p in placements) == 0
