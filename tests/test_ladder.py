"""The cheapest goes first, what is lost for good last, and nothing is asked for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvpsi.ladder import LOSSY, Ladder, Offer, Rung


class Stack(Rung):
    """Gives its offers one by one; ``lies`` if nothing goes when it is asked."""

    def __init__(self, name: str, *offers: Offer, lies: bool = False) -> None:
        self.name = name
        self.offers = list(offers)
        self.lies = lies

    def offer(self) -> Offer | None:
        return self.offers[0] if self.offers else None

    def give(self, n_bytes: int) -> int:  # noqa: ARG002 - one whole offer at once
        return 0 if self.lies else self.offers.pop(0).n_bytes


def test_the_cheapest_a_byte_goes_first() -> None:
    dear, cheap = Stack("read anew", Offer(100, 1.0)), Stack("in a file", Offer(10, 0.01), Offer(10, 5.0))
    ladder = Ladder([dear, cheap])
    assert ladder.give(5) == 10
    assert ladder.given_bytes == {"read anew": 0, "in a file": 10}
    assert ladder.give(50) == 100, "the second file is dearer by the byte"
    assert ladder.given_bytes == {"read anew": 100, "in a file": 10}


def test_what_is_lost_for_good_goes_last() -> None:
    lost, slow = Stack("forgotten", Offer(1000, LOSSY)), Stack("read anew", Offer(1, 3600.0))
    ladder = Ladder([lost, slow])
    ladder.give(1)
    assert ladder.given_bytes == {"forgotten": 0, "read anew": 1}
    assert ladder.give(1) == 1000


def test_who_is_spared_gives_nothing() -> None:
    cheap, dear = Stack("cheap", Offer(10, 0.1)), Stack("dear", Offer(10, 9.0))
    assert Ladder([cheap, dear]).give(20, sparing=("cheap",)) == 10
    assert cheap.offers and not dear.offers


def test_one_that_gives_nothing_is_not_asked_for_ever() -> None:
    liar, honest = Stack("liar", Offer(100, 0.0), lies=True), Stack("honest", Offer(10, 1.0))
    assert Ladder([liar, honest]).give(50) == 10


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10)), max_size=5), max_size=4),
    st.integers(0, 300),
)
def test_it_gives_enough_if_there_is_enough_and_never_what_is_not_needed(
    held: list[list[tuple[int, float]]], wanted: int
) -> None:
    rungs = [Stack(str(n), *(Offer(*each) for each in offers)) for n, offers in enumerate(held)]
    total = sum(n_bytes for offers in held for n_bytes, _ in offers)
    ladder = Ladder(rungs)
    given_bytes = ladder.give(wanted)
    assert given_bytes == sum(ladder.given_bytes.values())
    assert given_bytes >= min(wanted, total)
    assert given_bytes < wanted + 50 or given_bytes == 0
