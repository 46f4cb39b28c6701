"""The one check of the names of results."""

from __future__ import annotations

import pytest

from ara.errors import UsageError
from ara.names import MAX_NAME_BYTES, check_name


@pytest.mark.parametrize("name", ["ara-0.80", "x", "größer", "a.b", "a+b@c=d", "a" * MAX_NAME_BYTES])
def test_plain_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-w",
        "a/b",
        "../decompose/two-sided",
        "./two-sided",
        "/etc",
        "a\\b",
        "C:x",
        "a\nb",
        "a\x1b[31m",
        "a\u202eb",
        "a b",
        " ",
        "a\u00a0b",
        "a\u200bb",
        "a\0b",
        "x.partial",
        "x.copy",
        "x.old",
        "\udcff",
        "a" * (MAX_NAME_BYTES + 1),
        "ä" * MAX_NAME_BYTES,
    ],
    ids=ascii,
)
def test_all_others_are_a_usage_error_in_one_line(name: str) -> None:
    with pytest.raises(UsageError) as found:
        check_name(name)
    assert "\n" not in str(found.value) and str(found.value).isprintable()
