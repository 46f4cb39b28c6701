"""The fuzzer sees what it is there to see, ends what does not end, and makes the same cases again."""

import os
import random
import signal
import sys
import time

import psutil
import pytest

from tests.fuzz import harness, mutate
from tests.fuzz.harness import Case
from tests.fuzz.sandbox import Difference
from tests.fuzz.supervisor import Limits, run_all
from tests.fuzz.targets import TARGETS, weighted

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux does")
CASE = Case(["status"])


def misbehave(slot, number):
    if number == 1:
        time.sleep(600)
    if number == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    if number == 3:
        hoard = bytearray(10**9)
        hoard[::4096] = b"x" * len(hoard[::4096])
        time.sleep(600)
    return number * 10


@linux_only
def test_cases_that_do_not_end_are_ended_and_the_others_run():
    limits = Limits(seconds=4.0, resident_bytes=psutil.Process().memory_info().rss + 2**28)
    found = {
        one.number: one
        for one in run_all(list(range(6)), misbehave, workers=2, limits=limits, until=time.monotonic() + 100)
    }
    assert {number: one.report for number, one in found.items() if one.reason is None} == {0: 0, 4: 40, 5: 50}
    reasons = {number: one.reason[0] for number, one in found.items() if one.reason is not None}
    assert reasons == {1: "time", 2: "crash", 3: "memory"}


@pytest.mark.parametrize(
    ("code", "stderr", "kinds"),
    [
        (0, "", []),
        (1, "warning: w\nerror: e\nhint: h\n", []),
        (1, "error: these:\n  - a\n  - b\nhint: h\n", []),
        (0, "error: e\n", ["error"]),
        (1, "error: e\nerror: f\n", ["error"]),
        (1, "", ["error"]),
        (1, "error: e\nand more\n", ["error"]),
        (2, "Usage: ara\nTry ara -h\n\nError: no \u2028 option\n", []),
        (70, "error: this is a bug in ara\n", ["exit"]),
        (1, "Traceback (most recent call last):\nerror: e\n", ["traceback"]),
        (1, "error: \x1b[31me\n", ["output"]),
    ],
)
def test_what_a_command_says_is_judged(code, stderr, kinds):
    assert [failure.kind for failure in harness._judge(CASE, code, "", stderr)] == kinds


@pytest.mark.parametrize(
    ("code", "created", "bad"),
    [
        (1, ["ws/.lock", "ws/cache/tokens/x.safetensors"], False),
        (1, ["ws/decompose/.x.partial", "ws/decompose/.x.partial/.journal.json"], False),
        (1, ["ws/allocate/x", "ws/allocate/x/manifest.json", "ws/allocate/x/ranks.json"], False),
        (0, ["out/new/decompose/x/manifest.json"], False),
        (
            1,
            ["out/new", "out/new/workspace.json", "out/new/eval", "out/new/eval/x", "out/new/eval/x/manifest.json"],
            False,
        ),
        (1, ["ws/allocate/x", "ws/allocate/y", "ws/allocate/y/manifest.json"], True),
        (1, ["ws/decompose/.x.partial"], True),
        (1, ["ws/allocate/.x.partial", "ws/allocate/.x.partial/.journal.json"], True),
        (1, ["out/new", "out/new/workspace.json"], True),
        (1, ["cache/gguf/.aside-x"], True),
        (0, ["ws/truncate/.x.partial"], True),
        (0, ["cwd/x"], True),
        (1, ["tmp/x"], True),
    ],
)
def test_what_a_command_leaves_is_judged(code, created, bad):
    assert bool(harness._written(CASE, code, Difference(created))) == bad


def test_the_same_seed_gives_the_same_bytes():
    valid = {"a": [1, 2, {"b": "c"}], "d": None}
    words = ({"x": 1}, "y")
    made = [[mutate.json_bytes(random.Random(seed), valid, words) for seed in range(300)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 200
    assert words == ({"x": 1}, "y")
    assert valid == {"a": [1, 2, {"b": "c"}], "d": None}


def test_every_target_has_its_share():
    turn = weighted(list(TARGETS))
    assert {name: turn.count(name) for name in TARGETS} == {one.name: one.weight for one in TARGETS.values()}


def test_an_exception_is_known_by_where_it_came_from():
    from ara.jsonfile import parse

    with pytest.raises(ValueError) as caught:
        parse("{")
    failure = harness._escaped(caught.value)
    assert failure.kind == "traceback"
    assert failure.signature.startswith("JSONDecodeError at ara/jsonfile.py:parse → ")
    assert failure.text.startswith("json.decoder.JSONDecodeError")
