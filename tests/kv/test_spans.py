"""Which pages go back: never one with a byte of a cell in use, always one of free cells only that was written to."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from kvpsi.kv.cells import BoolArray
from kvpsi.kv.layout import Plane
from kvpsi.kv.pages import PAGE_BYTES
from kvpsi.kv.spans import free_bytes, whole_pages_in

SPACE = 40 * PAGE_BYTES
Stream = tuple[list[Plane], BoolArray, BoolArray]


@st.composite
def caches(draw: st.DrawFn) -> list[Stream]:
    """Streams of planes that do not overlap, often right behind each other, with masks of free and slack cells."""
    n_cells = draw(st.integers(1, 40))
    sizes = draw(st.lists(st.sampled_from([2, 64, 200, 384, 640, 1024]), min_size=1, max_size=3))
    at = draw(st.integers(0, 2 * PAGE_BYTES))
    streams: list[Stream] = []
    for _ in range(draw(st.integers(1, 3))):
        planes = []
        for size in sizes:
            if at + n_cells * size > SPACE:
                return streams
            planes.append(Plane(at, size))
            at += n_cells * size + draw(st.sampled_from([0, 0, 0, 100]))
        free = np.array(draw(st.lists(st.booleans() | st.just(True), min_size=n_cells, max_size=n_cells)))
        slack = free & np.array(draw(st.lists(st.booleans(), min_size=n_cells, max_size=n_cells)))
        streams.append((planes, free, slack))
    return streams


@given(caches())
def test_pages_are_those_that_a_look_at_every_byte_finds(streams: list[Stream]) -> None:
    free_byte, slack_byte = np.zeros(SPACE, dtype=bool), np.zeros(SPACE, dtype=bool)
    for planes, free, slack in streams:
        for plane in planes:
            for cell in range(free.size):
                start = plane.base + cell * plane.bytes_per_cell
                free_byte[start : start + plane.bytes_per_cell] = free[cell]
                slack_byte[start : start + plane.bytes_per_cell] = slack[cell]
    whole = free_byte.reshape(-1, PAGE_BYTES).all(axis=1)
    wanted = whole & slack_byte.reshape(-1, PAGE_BYTES).any(axis=1)
    found = whole_pages_in(free_bytes(*stream) for stream in streams)
    given_back = np.zeros(SPACE // PAGE_BYTES, dtype=bool)
    for span in found:
        pages = given_back[span.start // PAGE_BYTES : span.end // PAGE_BYTES]
        assert span.n_bytes % PAGE_BYTES == 0 and pages.size and not pages.any(), "whole, and not twice"
        pages[:] = True
    assert not (given_back & ~whole).any(), "a byte in use would be lost"
    assert not (wanted & ~given_back).any(), "memory would be kept"
    assert [span.start for span in found] == sorted(span.start for span in found)


def test_streams_that_touch_share_the_page_on_their_border() -> None:
    half = PAGE_BYTES // 2
    free, slack, nothing = np.array([True]), np.array([True]), np.array([False])
    first, second = free_bytes([Plane(0, half)], free, slack), free_bytes([Plane(half, half)], free, nothing)
    assert [(s.start, s.end) for s in whole_pages_in([first, second])] == [(0, PAGE_BYTES)]
    in_use = free_bytes([Plane(half, half)], nothing, nothing)
    assert whole_pages_in([first, in_use]) == [] == whole_pages_in([])
