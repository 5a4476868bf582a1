"""Parsing of llama.cpp's saved states: what is right comes back, what is not is a LayoutError and nothing else."""

from __future__ import annotations

import struct
import tracemalloc

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvpsi.errors import LayoutError
from kvpsi.kv.statedata import HEADER_BYTES, SectionState, TensorRows, parse_state, sequence_from_whole

HEADER = b"ggsq\x02\0\0\0"


def written(section: SectionState, ext: int = 0) -> bytes:
    """A section as `llama_kv_cache::state_write` writes it."""
    out = [struct.pack("<I", section.n_stream)]
    for stream in range(section.n_stream):
        if stream != section.stream or not section.positions:
            out.append(struct.pack("<I", 0))
            continue
        out.append(struct.pack("<I", len(section.positions)))
        for pos, owners in zip(section.positions, section.owners, strict=True):
            out.append(struct.pack("<iI", pos, len(owners)) + b"\xee" * ext + struct.pack(f"<{len(owners)}i", *owners))
        out.append(struct.pack("<II", section.v_transposed, len(section.keys)))
        out += [struct.pack("<iQ", 1, rows.bytes_per_cell) + rows.data for rows in section.keys]
        for rows in section.values:
            size = rows.bytes_per_cell
            sizes = struct.pack("<II", size, rows.n_rows) if section.v_transposed else struct.pack("<Q", size)
            out.append(struct.pack("<i", 1) + sizes + rows.data)
    return b"".join(out)


@st.composite
def sections(draw: st.DrawFn) -> SectionState:
    n_stream = draw(st.integers(1, 4))
    n_cells, n_layer = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    transposed = draw(st.booleans())

    def rows(n_rows: int) -> TensorRows:
        size = draw(st.integers(1, 6))
        n = size * n_rows * n_cells
        return TensorRows(size, n_rows, draw(st.binary(min_size=n, max_size=n)), 1)

    return SectionState(
        n_stream,
        draw(st.integers(0, n_stream - 1)),
        tuple(draw(st.lists(st.integers(0, 2**31 - 1), min_size=n_cells, max_size=n_cells))),
        tuple((draw(st.integers(0, 3)),) for _ in range(n_cells)),
        transposed,
        tuple(rows(1) for _ in range(n_layer)),
        tuple(rows(draw(st.integers(1, 3)) if transposed else 1) for _ in range(n_layer)),
    )


@given(sections())
def test_what_was_written_is_read(section: SectionState) -> None:
    assert parse_state(HEADER + written(section)) == [section]


@given(sections(), sections())
def test_two_caches_are_two_sections(first: SectionState, second: SectionState) -> None:
    assert parse_state(HEADER + written(first) + written(second)) == [first, second]


def test_model_specific_cell_data_is_skipped() -> None:
    section = parse_state(HEADER + written(SAMPLE, ext=12))
    assert section == [SAMPLE]


def test_a_sequence_without_cells_is_an_empty_section() -> None:
    assert parse_state(HEADER + struct.pack("<IIII", 3, 0, 0, 0)) == [SectionState(3, 0, (), (), False, (), ())]


def _sample() -> SectionState:
    keys = tuple(TensorRows(8, 1, bytes(range(16)), 1) for _ in range(2))
    values = tuple(TensorRows(4, 1, bytes(range(8)), 1) for _ in range(2))
    return SectionState(1, 0, (0, 1), ((0,), (0,)), False, keys, values)


SAMPLE = _sample()
WHOLE = HEADER + written(SAMPLE)


@pytest.mark.parametrize("end", range(len(WHOLE)))
def test_a_truncated_state_is_refused_or_has_no_values(end: int) -> None:
    try:
        found = parse_state(WHOLE[:end])
    except LayoutError:
        return
    # cut exactly behind the keys it looks like the state of a model that keeps no values
    assert len(found) == 1 and found[0].keys == SAMPLE.keys and found[0].values == ()


def test_bytes_behind_the_end_are_refused() -> None:
    for tail in (b"\0", b"\0" * 7, b"\xff" * 64):
        with pytest.raises(LayoutError):
            parse_state(WHOLE + tail)


HOSTILE = {
    "nothing": b"",
    "header only": HEADER,
    "no stream": HEADER + struct.pack("<I", 0),
    "too many streams": HEADER + struct.pack("<I", 257) + b"\0" * 4096,
    "4 billion cells": HEADER + struct.pack("<II", 1, 0xFFFFFFFF) + b"\0" * 64,
    "a negative position": HEADER + struct.pack("<IIiIi", 1, 1, -1, 1, 0) + written(SAMPLE)[8:],
    "4 billion owners": HEADER + struct.pack("<IIII", 1, 1, 0, 0xFFFFFFFF) + b"\0" * 64,
    "no layer": HEADER + struct.pack("<IIIIiII", 1, 1, 0, 1, 0, 0, 0),
    "4 billion layers": HEADER + struct.pack("<IIIIiII", 1, 1, 0, 1, 0, 0, 0xFFFFFFFF) + b"\0" * 64,
    "v transposed twice": HEADER + struct.pack("<IIIIiII", 1, 1, 0, 1, 0, 2, 1) + b"\0" * 64,
    "a row of exabytes": HEADER + struct.pack("<IIIIiIIiQ", 1, 1, 0, 1, 0, 0, 1, 1, 2**64 - 1) + b"\0" * 64,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_state_is_refused_without_a_large_allocation(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(LayoutError) as caught:
            parse_state(HOSTILE[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith("The saved state") and "\n" not in str(caught.value)
    assert peak < 1 << 20


@settings(max_examples=500)
@given(st.data())
def test_a_damaged_state_is_parsed_or_refused_and_nothing_else(data: st.DataObject) -> None:
    damaged = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(HEADER_BYTES, len(damaged) - 4))
        damaged[at : at + 4] = struct.pack("<I", data.draw(st.sampled_from([0, 1, 2, 255, 2**31, 2**32 - 1])))
    try:
        found = parse_state(bytes(damaged))
    except LayoutError:
        return
    for section in found:
        assert all(0 <= p < 2**31 for p in section.positions)
        assert len(section.owners) == len(section.positions)
        for rows in (*section.keys, *section.values):
            assert len(rows.data) == rows.bytes_per_cell * rows.n_rows * len(section.positions)


@settings(max_examples=500)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(data: bytes) -> None:
    try:
        found = parse_state(HEADER + data)
    except LayoutError:
        return
    assert found and all(not s.positions or s.keys for s in found)


def test_the_state_of_a_whole_context_becomes_that_of_a_sequence() -> None:
    whole = struct.pack("<I", 5) + b"llama" + written(SAMPLE)
    assert sequence_from_whole(whole, HEADER) == WHOLE


@pytest.mark.parametrize("state", [b"", b"\x05\0\0", struct.pack("<I", 100) + b"llama", struct.pack("<I", 2**32 - 1)])
def test_what_does_not_begin_with_an_architecture_is_refused(state: bytes) -> None:
    with pytest.raises(LayoutError):
        sequence_from_whole(state, HEADER)
