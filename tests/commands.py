"""Commands as people type them, run in this process, and how their errors are checked."""

from __future__ import annotations

from typing import Any

from typer.testing import CliRunner

from ara_cli.app import app


def ara(*words: Any, env: dict[str, str] | None = None, piped: bytes | None = None) -> Any:
    """Run ``ara WORDS``, with ``piped`` on stdin."""
    return CliRunner().invoke(app, [str(word) for word in words], env=env, input=piped)


def done(*words: Any, env: dict[str, str] | None = None) -> Any:
    """Run ``ara WORDS``, which must succeed."""
    result = ara(*words, env=env)
    assert result.exit_code == 0, result.output
    return result


def refused(result: Any, code: int, *words: str, hint: bool = True) -> str:
    """Check for one error with its hint on stderr and nothing on stdout; return stderr, which holds all ``words``.

    ``hint=False`` is for errors that need none.
    """
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert lines[0].startswith("error: "), result.stderr
    if hint or lines[-1].startswith("hint: "):
        assert lines.pop().startswith("hint: "), result.stderr
    assert all(line.startswith("  - ") for line in lines[1:]), result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    return str(result.stderr)


def decompose_arguments(settings: dict[str, Any], root: Any) -> list[str]:
    """Return the words of ``ara decompose`` with these settings."""
    options = {name.replace("_", "-"): str(value) for name, value in settings.items() if name != "model"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return ["decompose", settings["model"], *words, "-w", str(root)]
