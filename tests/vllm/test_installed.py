"""vLLM and ARA in one environment: each accepts the versions that are installed here."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
_FILE = Path(__file__).resolve().parents[2] / "pyproject.toml"
_PROJECT = tomllib.loads(_FILE.read_text(encoding="utf-8"))["project"]
_VLLM = packages_distributions()["vllm"][0]  # the build for CPUs is another distribution


def _refused(lines: list[str]) -> list[str]:
    """Return the requirements that an installed distribution does not satisfy; some are not installed here."""
    refused = []
    for one in map(Requirement, lines):
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(one.name)
        except PackageNotFoundError:
            continue
        if installed not in one.specifier:
            refused.append(f"{one}, installed: {installed}")
    return refused


def test_the_installed_versions_are_accepted_by_both() -> None:
    assert _refused(_PROJECT["dependencies"]) == []
    assert _refused(requires(_VLLM) or []) == []


def test_the_version_of_vllm_is_one_of_the_extra() -> None:
    (wanted,) = map(Requirement, _PROJECT["optional-dependencies"]["vllm"])
    assert version(_VLLM) in wanted.specifier
