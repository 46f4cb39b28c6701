"""Runs one case in this process, the way the command line runs it, and holds it to the one property.

The property: exit code 0, 1 or 2; where it is not 0 exactly one ``error:``, else none; no traceback, on no stream;
nothing half-written, nothing written elsewhere. Time and memory are the business of :mod:`tests.fuzz.supervisor`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.sandbox import Content, Difference, Sandbox, difference

_REPOSITORY = Path(__file__).resolve().parents[2]
_OURS = tuple(str(_REPOSITORY / name) + os.sep for name in ("ara", "ara_cli", "export"))
_ERROR = re.compile(r"error: ", re.IGNORECASE)
# Stages whose finished parts stay when they are stopped: they go on from there.
_RESUMABLE = ("decompose", "train-masks", "eval", "compare")
_ALWAYS = re.compile(r"(ws|half|out/[^/]+)/(\.lock|cache(/.*)?)$|cache(/.*)?$")
_ASIDE = re.compile(r"\.aside-|\.partial(/|$)|\.old(/|$)|\.copy(/|$)")
# Lines of an error that lists several problems, of usage errors, and what may stand around an error.
_MORE_LINES = re.compile(r"  - |hint: |warning: |Usage: |Try ")

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "ARA_DEBUG": "1",  # a bug of ours comes out as it is
    "COLUMNS": "200",
    "NO_COLOR": "1",
}


@dataclass
class Case:
    """One call of ``ara`` on spoilt files.

    Attributes:
        argv: words after ``ara``; paths are relative to ``cwd`` of the sandbox, ``{root}`` stands for the sandbox.
        files: path below the sandbox → what is put there.
        environ: further variables.
        outputs: patterns of paths below the sandbox that the command may write outside of workspaces.
        locked: hold the lock of this workspace meanwhile.
        stdin: what the command reads.
    """

    argv: list[str]
    files: dict[str, Content] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    locked: str | None = None
    stdin: str = ""

    @property
    def size(self) -> int:
        """Bytes that it is made of: the smaller, the better it shows a fault."""
        files = sum(len(content) if isinstance(content, bytes) else 8 for content in self.files.values())
        return files + sum(map(len, self.argv)) + len(self.stdin)


@dataclass
class Failure:
    """What a case did that no case may do.

    Attributes:
        kind: traceback, exit, error, output, written, time, memory, crash.
        signature: equal for failures with one cause, as far as can be told.
        text: what was seen.
    """

    kind: str
    signature: str
    text: str


@dataclass
class Outcome:
    """What became of a case."""

    code: int | None
    output: str
    failures: list[Failure]


def run(case: Case, sandbox: Sandbox, noise: Path | None = None) -> Outcome:
    """Run a case in the sandbox.

    Args:
        case: what to run.
        sandbox: of this worker; is mended first.
        noise: file that the descriptors 1 and 2 of this process lead to.
    """
    from typer.testing import CliRunner

    from ara_cli.app import app

    sandbox.reset()
    sandbox.put(case.files)
    root = str(sandbox.root)
    argv = [word.replace("{root}", root) for word in case.argv]
    environ = dict(os.environ)
    folders = {"ARA_CACHE_DIR": "cache", "TMPDIR": "tmp", "HOME": "home", "HF_HOME": "home/hf"}
    os.environ.update({name: f"{root}/{folder}" for name, folder in folders.items()})
    os.environ.update({name: text.replace("{root}", root) for name, text in case.environ.items()})
    known, sys.argv = sys.argv, ["ara", *argv]
    os.chdir(sandbox.root / "cwd")
    before = sandbox.look()
    try:
        with _lock(case, sandbox):
            result = CliRunner().invoke(app, argv, input=case.stdin)
    finally:
        sys.argv = known
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(sandbox.root)
    heard = _heard(noise)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        failures = [_escaped(result.exception)]
        code = None
    else:
        code = result.exit_code
        failures = [*_judge(case, code, result.stdout, result.stderr), *_judge_noise(heard)]
    changes = difference(before, sandbox.look())
    failures += _written(case, code, changes)
    return Outcome(code, f"{result.output}\n{heard}".strip().replace(root, "{root}"), failures)


def _lock(case: Case, sandbox: Sandbox) -> Any:
    from contextlib import nullcontext

    from filelock import FileLock

    return FileLock(sandbox.root / case.locked / ".lock") if case.locked else nullcontext()


def _heard(noise: Path | None) -> str:
    """Return, and forget, what was written past Python's streams."""
    if noise is None or not noise.stat().st_size:
        return ""
    text = noise.read_text(encoding="utf-8", errors="replace")
    os.truncate(noise, 0)
    return text


def _escaped(error: BaseException) -> Failure:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(_OURS)]
    places = [_place(frame) for frame in (*ours[-1:], *frames[-1:])]
    where = " → ".join(dict.fromkeys(places))
    last = traceback.format_exception_only(error)[-1].strip()[:300]
    whole = "".join(traceback.format_exception(error))
    return Failure("traceback", f"{type(error).__name__} at {where}", f"{last}\n{whole[-6000:]}")


def _place(frame: traceback.FrameSummary) -> str:
    path = frame.filename
    for mark in ("site-packages/", f"{_REPOSITORY}/"):
        path = path.rpartition(mark)[2]
    return f"{path}:{frame.name}"


def _judge(case: Case, code: int, stdout: str, stderr: str) -> list[Failure]:
    failures = []
    command = case.argv[0] if case.argv else ""
    if code not in (0, 1, 2):
        failures.append(Failure("exit", f"exit code {code} of {command}", stderr[-2000:]))
    lines = stderr.split("\n")
    errors = [index for index, line in enumerate(lines) if _ERROR.match(line)]
    if len(errors) != (code != 0):
        failures.append(Failure("error", f"{len(errors)} error lines at exit code {code} of {command}", stderr[-2000:]))
    elif errors:
        stray = [line for line in lines[errors[0] + 1 :] if line and not _MORE_LINES.match(line)]
        if stray:
            failures.append(Failure("error", f"an error of {command} in several lines", stderr[-2000:]))
    for text in (stdout, stderr):
        if "Traceback (most recent call last)" in text:
            failures.append(Failure("traceback", f"a traceback in the output of {command}", text[-2000:]))
        if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text):
            failures.append(Failure("output", f"control characters in the output of {command}", repr(text[-2000:])))
    if "--json" in case.argv and code != 2:
        try:
            json.loads(stdout, parse_constant=lambda name: json.loads(name + "!"))
        except ValueError as error:
            failures.append(Failure("output", f"--json of {command} is no JSON document", f"{error}\n{stdout[:2000]}"))
    return failures


def _judge_noise(heard: str) -> list[Failure]:
    if "Traceback" in heard or "Exception ignored" in heard or re.search(r"^error: ", heard, re.MULTILINE):
        return [Failure("output", "a library wrote an error of its own", heard[-2000:])]
    return []


def _written(case: Case, code: int | None, changes: Difference) -> list[Failure]:
    """Look for what is half there, and for what should not be there at all."""
    allowed = [re.compile(pattern) for pattern in case.outputs]

    def fine(name: str) -> bool:
        if _ASIDE.search(name):
            return False
        return bool(_ALWAYS.match(name)) or (code == 0 and any(pattern.fullmatch(name) for pattern in allowed))

    # A command that fails before it knows the traceback has a worse fault than files.
    if code is None:
        return []
    created = [name for name in changes.created if not fine(name)]
    changed = [name for name in changes.changed if not fine(name)]
    removed = [name for name in changes.removed if not fine(name) and not _ASIDE.search(name)]
    if code == 0:
        halves = [name for name in created if _ASIDE.search(name) or name.endswith(".lock-owner.json")]
        outside = [name for name in (*created, *changed, *removed) if not re.match(r"(ws|half|out/[^/]+)(/|$)", name)]
        bad = halves + outside
    else:
        # What is whole may stay: of several stages those before the one that failed, with the workspace around them.
        whole = tuple(f"{name.rpartition('/')[0]}/" for name in created + changed if name.endswith("/manifest.json"))
        created, changed = ([name for name in names if not _around(name, whole)] for names in (created, changed))
        kept = [name for name in created if not _resumable(name, created)]
        # What an interrupted run left may go on, or be thrown away.
        bad = kept + [name for name in changed + removed if not _ASIDE.search(name) and ".journal" not in name]
    if not bad:
        return []
    command = case.argv[0] if case.argv else ""
    shown = "\n".join(bad[:20])
    sort = re.sub(r"[0-9a-f]{8,}|\d+", "N", bad[0])
    state = "after success" if code == 0 else "after an error"
    return [Failure("written", f"{command} leaves {state}: {sort[:60]}", shown)]


def _resumable(name: str, created: list[str]) -> bool:
    """Tell whether a path is part of what a resumable stage leaves to go on from: finished files and a journal."""
    partial = re.compile(rf"(ws|half|out/[^/]+)/({'|'.join(_RESUMABLE)})/\.[^/]+\.partial")
    left = {found[0] for path in created if path.endswith("/.journal.json") and (found := partial.match(path))}
    inside = partial.match(name)
    if inside is not None:
        return inside[0] in left
    return _around(name, tuple(f"{folder}/" for folder in left))


def _around(name: str, folders: tuple[str, ...]) -> bool:
    """Tell whether a path lies in one of these results, or is of the workspace that holds one."""
    if f"{name}/".startswith(folders):
        return True
    holder = f"{name}/".removesuffix("workspace.json/")
    return any(folder.startswith(holder) for folder in folders)
