"""Whether a planned reserve keeps its promise in simulated time."""

from __future__ import annotations

import pytest

from kvpsi.sim.risk import killed_share


@pytest.mark.parametrize("reading", [False, True])
def test_somebody_is_killed_no_more_often_than_is_planned(reading: bool) -> None:
    assert killed_share(0.3, range(10), reading=reading) <= 0.3


def test_with_a_fifth_of_the_reserve_it_is_not_kept() -> None:
    assert killed_share(0.3, range(10), reserve_share=0.2) > 0.3, "so that the test above is one"
