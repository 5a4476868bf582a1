"""The choice of a size for a rebuilt context, on numbers alone."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvpsi.errors import UsageError
from kvpsi.kv import RebuildSettings
from kvpsi.kv.rebuild.sizes import CELLS_STEP, Sizes, larger_cells, reachable_cells, round_up, smaller_cells

PLAIN = Sizes(
    n_cells=2048,
    floor_cells=256,
    step_cells=512,
    committed_cells=2048,
    used_cells=100,
    limit_cells=2048,
    cap_cells=2048,
)


@st.composite
def any_sizes(draw: st.DrawFn) -> Sizes:
    """A context between its floor and its first size, with any limits."""
    blocks = draw(st.integers(1, 40))
    floor = draw(st.integers(1, blocks))
    committed = draw(st.integers(floor, blocks)) * CELLS_STEP
    n_cells = blocks * CELLS_STEP
    limits = st.integers(0, n_cells)
    return Sizes(
        n_cells=n_cells,
        floor_cells=floor * CELLS_STEP,
        step_cells=RebuildSettings(min_step_share=draw(st.floats(0.01, 1.0))).step_cells(n_cells),
        committed_cells=committed,
        used_cells=draw(st.integers(0, committed)),
        limit_cells=draw(limits),
        cap_cells=draw(limits),
    )


def is_a_size(cells: int, sizes: Sizes) -> bool:
    return cells % CELLS_STEP == 0 and sizes.floor_cells <= cells <= sizes.n_cells


@given(any_sizes(), st.booleans())
def test_shrinking_is_to_a_possible_size_within_both_limits(sizes: Sizes, too_soon: bool) -> None:
    target = smaller_cells(sizes, too_soon=too_soon)
    if target is not None:
        assert is_a_size(target, sizes)
        assert target <= sizes.allowed_cells < sizes.committed_cells


@given(any_sizes())
def test_only_the_user_does_not_wait(sizes: Sizes) -> None:
    at_once = smaller_cells(sizes, too_soon=True)
    assert (at_once is not None) == sizes.user_wants_less
    later = smaller_cells(sizes, too_soon=False)
    assert (later is not None) == (sizes.committed_cells > sizes.allowed_cells)


@given(any_sizes())
def test_what_the_limits_have_room_for_is_not_forgotten(sizes: Sizes) -> None:
    target = smaller_cells(sizes, too_soon=False)
    if target is not None and round_up(sizes.used_cells) <= sizes.fitting(sizes.allowed_cells):
        assert target >= sizes.used_cells


@given(any_sizes())
def test_growing_leaves_room_for_the_copy(sizes: Sizes) -> None:
    reachable = reachable_cells(sizes)
    assert is_a_size(reachable, sizes)
    assert reachable >= sizes.committed_cells
    if reachable > sizes.committed_cells:
        assert reachable <= sizes.cap_cells
        assert sizes.limit_cells == sizes.n_cells or reachable + sizes.used_cells <= sizes.limit_cells


@given(any_sizes(), st.integers(0, 12_000))
def test_growing_is_enough_if_that_can_be_reached(sizes: Sizes, wanted: int) -> None:
    larger, reachable = larger_cells(sizes, wanted), reachable_cells(sizes)
    assert sizes.committed_cells <= larger <= reachable
    assert larger >= min(wanted, reachable)


@given(any_sizes(), st.integers(0, 12_000))
def test_what_has_just_grown_is_not_shrunk_again(sizes: Sizes, wanted: int) -> None:
    larger = larger_cells(sizes, wanted)
    if larger > sizes.committed_cells:
        assert smaller_cells(replace(sizes, committed_cells=larger), too_soon=False) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"limit_cells": 2000}, 1536),  # a little is asked for, a step is given
        ({"limit_cells": 1200}, 1024),  # more than a step
        ({"limit_cells": 0}, 256),  # never below the floor
        ({"limit_cells": 1900, "used_cells": 1400}, 1792),  # less than a step, and room for a while
        ({"limit_cells": 1500, "used_cells": 1600}, 1280),  # tokens must be forgotten anyhow
        ({"cap_cells": 1900}, 1792),  # the user gets what was asked for
        ({}, None),
    ],
)
def test_sizes_to_shrink_to(change: dict[str, int], expected: int | None) -> None:
    assert smaller_cells(replace(PLAIN, **change), too_soon=False) == expected


@pytest.mark.parametrize(
    ("change", "wanted", "expected"),
    [
        ({}, 300, 768),  # a step
        ({}, 1000, 1024),  # what is wanted, rounded up
        ({}, 5000, 2048),  # at most the first size
        ({"limit_cells": 900}, 300, 768),
        ({"limit_cells": 800}, 300, 256),  # with the copy beside it there is no room for a step
        ({"cap_cells": 512}, 300, 512),  # less than a step, as the user's limit is the end
    ],
)
def test_sizes_to_grow_to(change: dict[str, int], wanted: int, expected: int) -> None:
    assert larger_cells(replace(PLAIN, committed_cells=256, **change), wanted) == expected


@pytest.mark.parametrize("wrong", [{"min_interval_s": -1.0}, {"min_step_share": 0.0}, {"min_step_share": 1.5}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        RebuildSettings(**wrong)
