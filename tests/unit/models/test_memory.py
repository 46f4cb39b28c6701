"""Free memory: the least of what the system has and what the control groups around the process leave."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ara.models import memory

_MIB = 1 << 20
_V1_UNLIMITED = 9223372036854771712


class Machine:
    """A made-up /proc and /sys/fs/cgroup."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        self._write(self.proc / "meminfo", f"MemTotal: 99 kB\nMemAvailable: {1000 * 1024} kB\nBuffers: 7 kB\n")

    def member_of(self, *lines: str) -> None:
        self._write(self.proc / "self" / "cgroup", "\n".join(lines) + "\n")

    def v2(self, group: str, limit: int | str, used: int, stat: str = "") -> None:
        folder = self.cgroups / group
        for name, value in (("memory.max", limit), ("memory.current", used), ("memory.stat", stat)):
            self._write(folder / name, f"{value}\n")

    def v1(self, group: str, limit: int, used: int, stat: str = "") -> None:
        folder = self.cgroups / "memory" / group
        for name, value in (("limit_in_bytes", limit), ("usage_in_bytes", used), ("stat", stat)):
            self._write(folder / f"memory.{name}", f"{value}\n")

    @staticmethod
    def _write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(memory, "_PROC", made.proc)
    monkeypatch.setattr(memory, "_CGROUPS", made.cgroups)
    return made


def test_without_groups_the_system_decides(machine: Machine) -> None:
    assert memory.available_bytes("cpu") == 1000 * _MIB


def test_a_container_of_version_2(machine: Machine) -> None:
    machine.member_of("0::/")
    machine.v2("", 300 * _MIB, 120 * _MIB)
    assert memory.available_bytes("cpu") == 180 * _MIB


def test_a_container_of_version_1_that_shows_the_hosts_path(machine: Machine) -> None:
    machine.member_of("5:devices:/docker/ab", "4:memory:/docker/ab")  # not there: its own group is the root
    machine.v1("", 300 * _MIB, 100 * _MIB)
    assert memory.available_bytes("cpu") == 200 * _MIB


@pytest.mark.parametrize("job", [350, 700], ids=["own-limit", "limit-of-the-parent"])
def test_the_least_of_all_groups_around_a_job_holds(machine: Machine, job: int) -> None:
    machine.member_of("0::/slurm/job_7")
    machine.v2("slurm", 500 * _MIB, 50 * _MIB)
    machine.v2("slurm/job_7", job * _MIB, 50 * _MIB)
    assert memory.available_bytes("cpu") == min(job - 50, 450) * _MIB


def test_no_limit_in_either_version(machine: Machine) -> None:
    machine.member_of("0::/", "4:memory:/")
    machine.v2("", "max", 10 * _MIB)
    machine.v1("", _V1_UNLIMITED, 10 * _MIB)
    assert memory.available_bytes("cpu") == 1000 * _MIB


def test_the_page_cache_of_a_group_counts_as_free(machine: Machine) -> None:
    machine.member_of("0::/")
    stat = f"anon 5\nactive_file {30 * _MIB}\ninactive_file {50 * _MIB}\nshmem 9"
    machine.v2("", 300 * _MIB, 290 * _MIB, stat)
    assert memory.available_bytes("cpu") == 90 * _MIB
    machine.v1("", 200 * _MIB, 190 * _MIB, f"inactive_file 1\ntotal_inactive_file {40 * _MIB}")
    assert memory.available_bytes("cpu") == 50 * _MIB


def test_more_used_than_allowed_is_nothing_free(machine: Machine) -> None:
    machine.member_of("0::/")
    machine.v2("", 300 * _MIB, 301 * _MIB)
    assert memory.available_bytes("cpu") == 0


def test_a_system_that_tells_nothing(machine: Machine) -> None:
    (machine.proc / "meminfo").unlink()
    assert memory.available_bytes("cpu") == 4 << 30


def test_processes_of_one_run_get_equal_parts(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available_bytes("cpu") == 250 * _MIB


def test_macos(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    def sysctl(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command == ["sysctl", "-n", "hw.memsize"]
        return subprocess.CompletedProcess(command, 0, f"{16 << 30}\n", "")

    monkeypatch.setattr(subprocess, "run", sysctl)
    assert memory.available_bytes("mps") == 8 << 30

    def missing(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert memory.available_bytes("cpu") == 4 << 30


def test_this_machine() -> None:
    assert 1 << 20 < memory.available_bytes("cpu") < 1 << 50


@pytest.mark.parametrize(
    ("free", "others", "place"),
    [
        (100, 60, "memory"),
        (99, 60, "mapped"),
        (60, 60, "mapped"),
        (59, 60, "nowhere"),
        (80, None, "memory"),
        (78, None, "mapped"),
        (0, None, "mapped"),
    ],
)
def test_where_weights_are(free: int, others: int | None, place: str) -> None:
    """If what else is needed is not known, half of the memory is left for it."""
    assert memory.place_of_weights(40, free, others) == place
