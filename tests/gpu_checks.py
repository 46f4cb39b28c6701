"""Checks that stand in for those of ``benchmarks/gpu_check`` in the tests of what runs them."""

from __future__ import annotations

import os
import time

from benchmarks.gpu_check.outcome import Notes, NotRun
from benchmarks.gpu_check.running import CheckEntry
from benchmarks.gpu_check.setting import Setting


def passing(setting: Setting, notes: Notes) -> None:
    notes.within("difference", 0.5, 1)
    notes.keep("device", setting.device)


def failing(setting: Setting, notes: Notes) -> None:
    notes.within("difference", 2, 1)
    notes.require("layers", 3, 4)


def raising(setting: Setting, notes: Notes) -> None:
    notes.keep("before", 1)
    raise ValueError("the device\nand more")


def missing(setting: Setting, notes: Notes) -> None:
    raise NotRun("no such package: pip install it")


def hanging(setting: Setting, notes: Notes) -> None:
    notes.keep("before", 1)
    time.sleep(600)


def dying(setting: Setting, notes: Notes) -> None:
    notes.keep("before", 1)
    os._exit(3)


def entry(name: str, seconds: float = 60) -> CheckEntry:
    """Return the entry of a function of this module."""
    return CheckEntry(name, f"the check {name}", f"tests.gpu_checks:{name}", seconds)
