import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ara_cli.formatting import bytes_text, count_text, percent, seconds_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (268.2 * 2**20, "268.2 MiB"),
        (2**30 - 1, "1.0 GiB"),  # rounds up into the next unit instead of "1024.0 MiB"
        (5000 * 2**40, "5000.0 TiB"),
    ],
)
def test_bytes(size, text):
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (999.7, "1.0k"), (113_000, "113.0k"), (134_515_008, "134.5M"), (999_960_000, "1.0B")],
)
def test_count(count, text):
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (0.424, "0.42 s"),
        (0.999, "1.0 s"),
        (4.24, "4.2 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (72, "1 min 12 s"),
        (3599.7, "1 h"),
        (7500, "2 h 5 min"),
        (math.inf, "unknown time"),
        (math.nan, "unknown time"),
    ],
)
def test_seconds(seconds, text):
    assert seconds_text(seconds) == text


@given(st.floats(0, 1e6))
def test_no_duration_shows_sixty_of_a_smaller_unit(seconds):
    assert not {"60 s", "60 min"} & {" ".join(pair) for pair in _pairs(seconds_text(seconds))}


@given(st.floats(0, 1e12))
def test_no_scaled_number_reaches_the_next_unit(value):
    assert float(bytes_text(value).split()[0]) < 1024
    assert float(count_text(value).rstrip("kMBT")) <= 1000  # 1e12 itself is "1.0T"


def test_percent():
    assert percent(0.8) == "80.0%"
    assert percent(1, digits=0) == "100%"


def _pairs(text):
    words = text.split()
    return zip(words[::2], words[1::2], strict=True)
