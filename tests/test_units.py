from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpsi.errors import UsageError
from kvpsi.units import format_bytes, parse_budget, parse_bytes, parse_share

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1", 1),
        ("4096", 4096),
        ("12b", 12),
        ("600M", 600 * MIB),
        ("600MiB", 600 * MIB),
        ("600mi", 600 * MIB),
        ("600MB", 600_000_000),
        ("8G", 8 * GIB),
        (" 8 g ", 8 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        (".5K", 512),
        ("1T", 1 << 40),
        ("0.1M", MIB // 10),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "M", "abc", "-1", "-5M", "+1M", "1e9", "nan", "inf", "1,5G", "1_000", "0x10", "5X", "6 00M"),
        *("٣M", "0", "0M", "0.1", "99999999999999999999T", "1" * 5000, "70%", "1.G", "1MiBs"),
    ],
)
def test_what_is_no_size_is_told_in_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"600M|out of range") as caught:
        parse_bytes(text)
    assert len(str(caught.value)) < 160


@pytest.mark.parametrize(("text", "share"), [("70%", 0.7), ("0.7", 0.7), ("1", 1.0), ("100%", 1.0), ("0.5 %", 0.005)])
def test_shares(text: str, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "0", "0%", "101%", "1.01", "-5%", "nan", "nan%", "7O%", "70%%", "70M"])
def test_what_is_no_share_is_told_in_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"write it as 70% or 0\.7"):
        parse_share(text)


def test_a_budget_is_a_size_or_a_percentage_of_the_total() -> None:
    assert parse_budget("25%", 8 * GIB) == 2 * GIB
    assert parse_budget("600M", 8 * GIB) == 600 * MIB
    assert parse_budget("1%", 10) == 1


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (360 * MIB, "360 MiB"),
        (GIB - 1, "1 GiB"),
        (-5 * MIB, "-5 MiB"),
        (3 << 50, "3072 TiB"),
    ],
)
def test_sizes_for_people(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


@given(st.integers(1, 1 << 60))
def test_a_bare_number_is_itself(size_bytes: int) -> None:
    assert parse_bytes(str(size_bytes)) == size_bytes


@given(st.integers(1, 1 << 59))
def test_what_is_shown_can_be_typed_and_means_about_the_same(size_bytes: int) -> None:
    assert parse_bytes(format_bytes(size_bytes)) == pytest.approx(size_bytes, rel=0.05)


@given(st.text(max_size=60))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    for parse in (parse_bytes, parse_share):
        try:
            assert parse(text) > 0
        except UsageError as error:
            assert "\n" not in str(error)
