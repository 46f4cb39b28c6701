"""Names that no result can have, and a workspace that has none, are refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import ara

BAD = ("../x", "a b", ".x", "x.partial", "x" * 201)
OPTIONS = {
    "decompose": ("--name",),
    "train-masks": ("--name", "--factors"),
    "allocate": ("--name", "--factors", "--masks"),
    "truncate": ("--name", "--allocation"),
    "eval": ("--name", "--checkpoint", "--export"),
    "export": ("--name", "--checkpoint"),
    "compare": ("--name", "--factors", "--masks"),
    "bench": ("--name", "--checkpoint", "--export"),
    "report": ("--name", "--checkpoint"),
    "generate": ("--checkpoint", "--export"),
    "chat": ("--checkpoint", "--export"),
    "serve": ("--checkpoint",),
}


@pytest.mark.parametrize(("command", "flag"), [(name, flag) for name, flags in OPTIONS.items() for flag in flags])
def test_a_name_is_refused_before_any_work(tmp_path: Path, command: str, flag: str) -> None:
    """There is no model and no workspace, which any work would find out."""
    words = {"decompose": ["nobody/nothing"], "generate": ["hello"]}.get(command, [])
    backend = ["--backend", "onnx"] if flag == "--export" else []
    for name in BAD:
        result = ara(command, *words, *backend, flag, name, "-w", str(tmp_path / "ws"), "-q")
        assert result.exit_code == 2, result.output
        assert "cannot be the name of a result" in result.stderr
        assert result.stderr.count("\n") == 2
    result = ara(command, *words, *backend, flag, "", "-w", str(tmp_path / "ws"), "-q")
    assert result.exit_code == 2 and f"Invalid value for {flag}: it is empty" in result.stderr
    assert not (tmp_path / "ws").exists()


def test_an_empty_workspace_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, it was the current one."""
    monkeypatch.chdir(tmp_path)
    result = ara("status", "-w", "")
    assert result.exit_code == 2 and "it is empty, expected a path" in result.stderr
    result = ara("status", env={"ARA_WORKSPACE": ""})
    assert result.exit_code == 1 and "there is no workspace at ara-workspace" in result.stderr
    assert list(tmp_path.iterdir()) == []
