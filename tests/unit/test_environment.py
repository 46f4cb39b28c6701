"""What the process can tell of itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ara import environment

_MIB = 1 << 20

# What an earlier stage of `ara run` has freed, and what cycles of its objects hold.
_RELEASED = """
import torch
from ara.environment import keep_freed_memory, peak_memory_bytes, release_memory, reset_peak_memory
keep_freed_memory()
cycle = [torch.ones(100 << 18)]
cycle.append(cycle)
small = [torch.ones(1 << 10) for _ in range(100)]
blocks = [torch.ones(10 << 18) for _ in range(20)]
above = torch.ones(1 << 18)
del cycle, blocks
reset_peak_memory()
before = peak_memory_bytes()
release_memory()
reset_peak_memory()
print(before >> 20, peak_memory_bytes() >> 20)
"""

# In a process of its own: the peak of a test process is whatever an earlier test held.
_RESET = """
from ara.environment import peak_memory_bytes, reset_peak_memory
block = bytearray(200 << 20)
del block
before = peak_memory_bytes()
reset_peak_memory()
after = peak_memory_bytes()
block = bytearray(90 << 20)
print(before >> 20, after >> 20, peak_memory_bytes() >> 20)
"""


def test_machine_names_its_parts_and_nobody(monkeypatch, tmp_path):
    import getpass
    import platform

    found = environment.machine()
    assert found["cores"] >= 1 and found["system"].startswith(platform.system())
    assert set(found) == {"system", "processor", "cores", "memory_bytes", "gpus"}
    words = " ".join(map(str, found.values()))
    assert platform.node() not in words and getpass.getuser() not in words.split()
    (tmp_path / "cpuinfo").write_text("vendor_id\t: X\nmodel name\t: A fast one @ 3 GHz\nmodel name\t: B\n")
    monkeypatch.setattr(environment, "_CPU_INFO", tmp_path / "cpuinfo")
    assert environment.machine()["processor"] == "A fast one @ 3 GHz"
    monkeypatch.setattr(environment, "_CPU_INFO", tmp_path / "none")
    assert environment.machine()["processor"] == (platform.processor() or None)


def test_versions_are_those_that_are_installed_and_nothing_is_imported(monkeypatch):
    from importlib import metadata

    installed = {"torch": "2.0", "transformers": "5.0", "lm_eval": "0.4.9"}

    def version(package):
        if package not in installed:
            raise metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(metadata, "version", version)
    found = environment.versions()
    assert set(found) == {"ara", "python", *installed} and found["lm_eval"] == "0.4.9"
    code = "import sys; from ara.environment import versions; versions(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert not {"torch", "transformers", "datasets", "lm_eval", "onnxruntime"} & set(loaded.split())


class FakeCuda:
    """Two GPUs with a peak each."""

    def __init__(self, used: bool = True) -> None:
        self.used, self.peaks = used, [300, 500]

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return self.used

    def device_count(self) -> int:
        return len(self.peaks)

    def max_memory_allocated(self, device: int) -> int:
        return self.peaks[device]

    def reset_peak_memory_stats(self, device: int) -> None:
        self.peaks[device] = 7


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=fake))
    return fake


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(environment, "_PROC_SELF", tmp_path)
    return tmp_path


def test_peak_of_all_gpus_and_its_reset(cuda: FakeCuda, proc: Path) -> None:
    assert environment.peak_memory_bytes() == 800
    environment.reset_peak_memory()
    assert environment.peak_memory_bytes() == 14


def test_a_gpu_that_is_not_used_does_not_count(cuda: FakeCuda, proc: Path) -> None:
    cuda.used = False
    (proc / "status").write_text("VmPeak:\t 9 kB\nVmHWM:\t 2048 kB\nVmRSS:\t 8 kB\n")
    environment.reset_peak_memory()
    assert environment.peak_memory_bytes() == 2 * _MIB
    assert cuda.peaks == [300, 500]


def test_reset_writes_the_code_of_the_high_water_mark(proc: Path) -> None:
    (proc / "clear_refs").touch()
    environment.reset_peak_memory()
    assert (proc / "clear_refs").read_text() == "5"


@pytest.mark.parametrize("status", [None, "Name:\tpython\n"], ids=["no-proc", "no-VmHWM"])
def test_where_proc_does_not_tell(
    proc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str | None
) -> None:
    monkeypatch.setattr(environment, "_PROC_SELF", tmp_path / "missing")
    if status is not None:
        (tmp_path / "missing").mkdir()
        (tmp_path / "missing" / "status").write_text(status)
    environment.reset_peak_memory()  # no error
    assert environment.peak_memory_bytes() > 10 * _MIB


def test_a_stage_is_not_charged_for_what_came_before_it() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the high-water mark cannot be reset here")
    done = subprocess.run([sys.executable, "-c", _RESET], capture_output=True, text=True, check=True, timeout=60)
    before, after, later = map(int, done.stdout.split())
    assert before >= 200
    assert after < 100
    assert after + 80 < later < before


def test_freed_memory_is_kept_where_the_c_library_can():
    """In a process of its own: what a block leaves behind stays resident and serves the next one."""
    script = (
        "import ctypes, ara.environment as e\n"
        "e.keep_freed_memory()\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p; libc.free.argtypes = [ctypes.c_void_p]\n"
        "resident = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 >> 20\n"
        "block = libc.malloc(ctypes.c_size_t(90 << 20)); ctypes.memset(block, 1, 90 << 20); libc.free(block)\n"
        "print(resident())\n"
    )
    if sys.platform != "linux" or not hasattr(__import__("ctypes").CDLL(None), "gnu_get_libc_version"):
        pytest.skip("no glibc here")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 90


def test_other_c_libraries_are_left_alone(monkeypatch):
    asked = []

    def missing(name):
        asked.append(name)
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    environment.keep_freed_memory()
    assert asked == ["libc.so.6"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc and /proc")
def test_a_stage_does_not_count_the_memory_of_earlier_ones():
    out = subprocess.run([sys.executable, "-c", _RELEASED], capture_output=True, text=True, check=True, timeout=120)
    before, after = map(int, out.stdout.split())
    assert after < before - 250


@pytest.mark.parametrize("in_use", [True, False])
def test_memory_of_a_gpu_goes_back_if_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch, in_use: bool) -> None:
    emptied: list[str] = []
    cuda = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: in_use, empty_cache=lambda: emptied.append("cuda")
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    environment.release_memory()
    assert emptied == ["cuda"] * in_use
