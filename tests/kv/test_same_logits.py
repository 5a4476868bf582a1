"""Two real contexts of a real model, one elastic and one stock, driven at random: every logit must be the same."""

from __future__ import annotations

import contextlib
from typing import ClassVar

import hypothesis.strategies as st
import llama_cpp
import numpy as np
import pytest
from contexts import Shape, batch_of, logits, open_context, open_model
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvpsi.kv.elastic import CacheSettings, ElasticCache, Forgotten

SEQ = st.integers(0, 2)


class TwoContexts(RuleBasedStateMachine):
    """Whatever is done to the elastic cache is done to a stock context, too."""

    model: ClassVar[llama_cpp.llama_model_p]
    shape: ClassVar[Shape]

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.stock = self.stack.enter_context(open_context(self.model, self.shape))
        self.ctx = self.stack.enter_context(open_context(self.model, self.shape))
        self.memory = llama_cpp.llama_get_memory(self.stock)
        self.saved: tuple[bytes, int] | None = None

    @initialize()
    def make_elastic(self) -> None:
        self.cache = ElasticCache(
            self.ctx, settings=CacheSettings(keep=4, tail=8, min_prune=1), on_forgotten=self.forget
        )

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
        self.stack.close()

    def forget(self, f: Forgotten) -> None:
        assert llama_cpp.llama_memory_seq_rm(self.memory, f.seq_id, f.first_pos, f.end_pos)

    def next_pos(self, seq_id: int) -> int:
        return int(llama_cpp.llama_memory_seq_pos_max(self.memory, seq_id)) + 1

    @rule(
        counts=st.tuples(st.integers(0, 40), st.integers(0, 20), st.integers(0, 12)),
        first=st.integers(100, 40000),
        interleave=st.booleans(),
    )
    def decode(self, counts: tuple[int, int, int], first: int, interleave: bool) -> None:
        tokens = []
        for seq_id, count in enumerate(counts):
            start = self.next_pos(seq_id)
            tokens += [(100 + (first + 7 * i + seq_id) % 40000, start + i, seq_id) for i in range(count)]
        tokens = tokens[: self.shape.n_batch]
        if not tokens:
            return
        if interleave:
            tokens.sort(key=lambda t: t[1])
        outputs = sorted({max(i for i, t in enumerate(tokens) if t[2] == s) for s in {t[2] for t in tokens}})
        with batch_of(tokens, outputs) as batch:
            code = llama_cpp.llama_decode(self.stock, batch)
            assert self.cache.decode(batch) == code
        if code == 0:
            for output in outputs:
                ours, theirs = logits(self.ctx, output), logits(self.stock, output)
                assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))

    @rule(seq_id=SEQ, p0=st.integers(-1, 120), length=st.integers(-1, 80))
    def remove_range(self, seq_id: int, p0: int, length: int) -> None:
        p1 = -1 if length < 0 else max(p0, 0) + length
        theirs = llama_cpp.llama_memory_seq_rm(self.memory, seq_id, p0, p1)
        assert self.cache.seq_rm(seq_id, p0, p1) == theirs

    @rule()
    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)
        self.cache.clear()

    @rule(seq_id=SEQ)
    def keep_one(self, seq_id: int) -> None:
        llama_cpp.llama_memory_seq_keep(self.memory, seq_id)
        self.cache.seq_keep(seq_id)

    @rule(src=SEQ, dst=SEQ, p1=st.integers(1, 100))
    def copy(self, src: int, dst: int, p1: int) -> None:
        if src == dst or self.next_pos(src) == 0:
            return
        end = p1 if self.shape.unified else -1
        if self.shape.unified:
            self.remove_range(dst, -1, -1)
        llama_cpp.llama_memory_seq_cp(self.memory, src, dst, 0, end)
        self.cache.seq_cp(src, dst, 0, end)

    @rule(n_cells=st.integers(1, 200))
    def evict(self, n_cells: int) -> None:
        self.cache.evict(n_cells)

    @rule()
    def release(self) -> None:
        self.cache.release_slack()

    @rule(seq_id=SEQ, shift=st.integers(1, 5))
    def move_positions(self, seq_id: int, shift: int) -> None:
        if not llama_cpp.llama_memory_can_shift(self.memory):
            return
        start = self.next_pos(seq_id) // 2
        llama_cpp.llama_memory_seq_add(self.memory, seq_id, start, -1, shift)
        self.cache.seq_add(seq_id, start, -1, shift)

    @rule(seq_id=SEQ)
    def save(self, seq_id: int) -> None:
        if self.next_pos(seq_id) == 0 or self.cache._rewritten:
            return
        size = llama_cpp.llama_state_seq_get_size(self.stock, seq_id)
        buffer = (llama_cpp.llama_cpp.ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_seq_get_data(self.stock, buffer, size, seq_id) == size
        self.saved = bytes(buffer), seq_id

    @rule()
    def restore(self) -> None:
        if self.saved is None or self.cache._rewritten:
            return
        data, seq_id = self.saved
        llama_cpp.llama_memory_seq_rm(self.memory, seq_id, -1, -1)
        source = (llama_cpp.llama_cpp.ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        theirs = llama_cpp.llama_state_seq_set_data(self.stock, source, len(data), seq_id) > 0
        assert self.cache.load_sequence(data, seq_id) == theirs
        if not theirs:
            self.clear()

    @invariant()
    def never_distrusts(self) -> None:
        if hasattr(self, "cache"):
            assert self.cache.distrust_reason is None

    @invariant()
    def same_cells_in_use(self) -> None:
        if hasattr(self, "cache") and self.cache._run is None:  # looking must not be what brings the record up to date
            mirror = self.cache.trackers[-1].mirror
            for seq_id in range(self.shape.n_seq):
                assert mirror.stream_of(seq_id).pos_max(seq_id) == self.next_pos(seq_id) - 1


SHAPES = {
    "unified-f16": Shape(),
    "unified-q8_0": Shape(kv_type=llama_cpp.GGML_TYPE_Q8_0),
    "streams-f16": Shape(n_ctx=768, unified=False),
    "streams-q8_0": Shape(n_ctx=768, unified=False, kv_type=llama_cpp.GGML_TYPE_Q8_0),
    "no-flash-attention": Shape(flash=False),
}


def drive(model_path, shape: Shape, *, examples: int, steps: int) -> None:  # type: ignore[no-untyped-def]
    with open_model(model_path) as model:
        machine = type("Machine", (TwoContexts,), {"model": model, "shape": shape})
        case = machine.TestCase
        case.settings = settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        case("runTest").debug()


@pytest.mark.engine
@pytest.mark.parametrize("name", SHAPES)
def test_logits_stay_bit_identical(default_model, name: str) -> None:  # type: ignore[no-untyped-def]
    drive(default_model, SHAPES[name], examples=8, steps=25)


@pytest.mark.engine
def test_logits_stay_bit_identical_with_a_sliding_window(gemma_model) -> None:  # type: ignore[no-untyped-def]
    drive(gemma_model, Shape(n_ctx=1024), examples=3, steps=20)
