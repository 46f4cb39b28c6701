"""Checks that the disk has room, before work that fills it begins."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ara.errors import DiskFullError
from ara.files import existing_folder
from ara.progress import Reporter


@dataclass(frozen=True)
class Need:
    """Something that will be written.

    Attributes:
        what: in words.
        bytes: at most.
        folder: where; it need not exist yet.
        later: whether another command writes it: too little room for it is a warning.
    """

    what: str
    bytes: int
    folder: Path
    later: bool = False


def check_room(needs: Sequence[Need], hint: str, report: Reporter) -> None:
    """Check that what is to be written fits on the disks of its folders, and report how much each part takes.

    Args:
        needs: what is to be written.
        hint: what to do if there is too little room.
        report: hears of the sizes, and of too little room for a later need.

    Raises:
        DiskFullError: there is too little room.
    """
    parts = say_needs(needs, report)
    for disk in dict.fromkeys(_disk(need.folder) for need in needs):
        here = [need for need in needs if _disk(need.folder) == disk]
        folder = existing_folder(here[0].folder)
        free = shutil.disk_usage(folder).free
        now = sum(need.bytes for need in here if not need.later)
        if free < now:
            raise DiskFullError(f"{folder} has {mebibytes(free)} free, needed are {mebibytes(now)}: {parts}", hint)
        if free < now + sum(need.bytes for need in here if need.later):
            names = " and ".join(need.what for need in here if need.later)
            report.warn(f"{folder} has {mebibytes(free)} free, which is too little for {names} as well")


def say_needs(needs: Sequence[Need], report: Reporter) -> str:
    """Report how much each part takes, and return it in words."""
    parts = ", ".join(f"{need.what} {mebibytes(need.bytes)}" for need in needs)
    report.fact(f"needed on the disk: {parts}")
    return parts


def mebibytes(size: int) -> str:
    """Return a size in MiB: ``12,853 MiB``."""
    return f"{size / 2**20:,.0f} MiB"


def _disk(folder: Path) -> int:
    """Return a number that tells disks apart."""
    return existing_folder(folder).stat().st_dev
