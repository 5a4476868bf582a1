"""Text as it comes: nothing is lost, nothing is shown twice, and nothing of a stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvpsi.serving.text import TextStream


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({min(c, len(data)) for c in cuts} | {len(data)})
    return [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@given(st.text(max_size=40), st.lists(st.integers(0, 80), max_size=20))
def test_without_a_stop_string_everything_comes_out(text: str, cuts: list[int]) -> None:
    stream = TextStream()
    shown = [stream.feed(piece) for piece in pieces_of(text.encode("utf-8", "surrogatepass"), cuts)]
    assert "".join(shown) + stream.finish() == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


@given(
    st.text("abx", max_size=30),
    st.lists(st.text("abx", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 30), max_size=12),
)
def test_it_ends_before_the_stop_string_that_is_complete_first(text: str, stop: list[str], cuts: list[int]) -> None:
    stream = TextStream(stop)
    shown = "".join(stream.feed(piece) for piece in pieces_of(text.encode(), cuts)) + stream.finish()
    found = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    assert shown == (text[: min(found)[1]] if found else text)
    assert (stream.stopped_by is not None) == bool(found)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(["###", "\nUser:"])
    assert stream.feed(b"Hello") == "Hello"
    assert stream.feed(b" #") == " "
    assert stream.feed(b"1") == "#1"
    assert stream.feed(b"\nUse") == ""
    assert stream.feed(b"ful") == "\nUseful"
    assert stream.feed(b"##") == "" and stream.feed(b"# rest") == ""
    assert stream.stopped_by == "###" and stream.feed(b"more") == "" and stream.finish() == ""


def test_half_a_character_waits_for_the_other_half() -> None:
    stream = TextStream()
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert stream.feed(first) == ""
    assert stream.feed(second) == "é"
    assert stream.feed(first) == "" and stream.finish() == "\ufffd"
