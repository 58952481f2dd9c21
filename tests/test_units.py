"""Sizes as people type them, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelite.errors import UsageError
from moelite.units import GIB, KIB, MIB, TIB, parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("4GiB", 4 * 2**30),
        ("4g", 4 * 2**30),
        ("4G", 4 * 2**30),
        ("4GB", 4 * 2**30),
        ("512 MiB", 512 * 2**20),
        ("  1.5KiB ", 1536),
        ("2T", 2 * 2**40),
        ("17", 17),
        ("17b", 17),
        (123, 123),
    ],
)
def test_sizes_are_binary(text, want) -> None:
    assert parse_bytes(text) == want


def test_the_named_units() -> None:
    assert (KIB, MIB, GIB, TIB) == (1024, 1024**2, 1024**3, 1024**4)


def test_a_share_needs_a_whole() -> None:
    assert parse_bytes("80%", total=1000) == 800
    assert parse_bytes("12.5 %", total=1000) == 125
    with pytest.raises(UsageError, match="'80%' is not a size"):
        parse_bytes("80%")


@pytest.mark.parametrize(
    "text", ["", "GiB", "four", "4 parsecs", "-4GiB", "4,5GiB", "1e9", "4GiBs"]
)
def test_what_is_no_size_is_refused(text) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        parse_bytes(text)
    assert "4GiB" in caught.value.fix


@pytest.mark.parametrize("text", ["0", "0GiB", 0, -5, "0.1"])
def test_nothing_is_no_size(text) -> None:
    with pytest.raises(UsageError, match="above zero"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "want"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * MIB + MIB // 2, "3.5 MiB"),
        (99 * GIB, "99.0 GiB"),
        (100 * GIB, "100 GiB"),
        (2 * TIB, "2.0 TiB"),
        (-2 * KIB, "-2.0 KiB"),
    ],
)
def test_sizes_are_shown_in_the_unit_that_fits(count, want) -> None:
    assert show_bytes(count) == want


@given(st.integers(1, 2**50))
def test_what_is_shown_can_be_typed(count) -> None:
    """Within the rounding of the shown digits: half of 0.1, or of 1 from 100 on."""
    shown = parse_bytes(show_bytes(count))
    assert abs(shown - count) <= 0.05 * count + 1
