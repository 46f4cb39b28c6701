"""Folders with the user's own tasks, as for ``lm_eval --include_path``.

Inspecting a folder runs none of its code. Loading a task does: its YAML can name Python functions and classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ara.errors import DataError, first_line
from ara.evaluation.silence import silence_lm_eval
from ara.files import check_regular, expand_user, read_bytes
from ara.workspace.manifest import file_sha256

# Suffixes of task files, and of the code and data that they may use.
_CONTENT = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".jinja", ".j2")
_READ = (".yaml", ".yml", ".py")
_IGNORED_FOLDERS = frozenset({"__pycache__", ".ipynb_checkpoints", ".git"})
# Most files of a folder. All tasks of lm-eval have about 15,000; a folder with more is probably a mistake.
_MOST_FILES = 50_000
_EXPECTED = "--include-path expects a folder with task files (.yaml)"


@dataclass(frozen=True, eq=False)
class TaskFolders:
    """Content of the folders.

    Attributes:
        paths: the folders; a task in a later folder replaces one of the same name.
        files: task, group or tag → its file; ``None`` for a tag.
        groups: names of groups, which may contain tasks of lm-eval.
        broken: file that cannot be read → problem.
        twice: name → two files of one folder that both define it.
        digest: sha256 (hex) over the files that determine the tasks, independent of the folders' location.
    """

    paths: tuple[Path, ...]
    files: Mapping[str, Path | None]
    groups: frozenset[str]
    broken: Mapping[Path, str]
    twice: Mapping[str, tuple[Path, Path]]
    digest: str

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def check(self, name: str) -> None:
        """Raise :class:`DataError` if a name is defined twice or its file cannot be read."""
        if name in self.twice:
            first, second = self.twice[name]
            raise DataError(f"task {name!r} is defined twice: by {first} and {second}", "rename or remove one of them")
        if name not in self:
            for path, problem in self.broken.items():
                if path.stem == name or name.encode() in path.read_bytes():
                    raise DataError(f"task {name!r}: {path} cannot be read: {problem}", "correct that file")

    def manager(self, name: str) -> Any:
        """Return lm-eval's index of ``name`` and all tasks that it may refer to."""
        return _manager(self.paths, defaults=name in self.groups)

    def file_of(self, name: str) -> Path:
        """Return the file of a task, or the last folder if the task has no file."""
        return self.files.get(name) or self.paths[-1]


def open_task_folders(names: Sequence[str]) -> TaskFolders | None:
    """Inspect folders of task files; return ``None`` if ``names`` is empty.

    Raises:
        DataError: a path is no folder, holds too many files, or holds an irregular task file.
        UsageError: a path begins with the home folder of an unknown user.
    """
    if not names:
        return None
    paths = tuple(expand_user(name, "--include-path").absolute() for name in names)
    broken: dict[Path, str] = {}
    twice: dict[str, tuple[Path, Path]] = {}
    sha = hashlib.sha256()
    for path in paths:
        seen: dict[str, Path] = {}
        outside: set[Path] = set()
        for file in _files(path):
            sha.update(f"{file.relative_to(path).as_posix()}\0{file_sha256(file)}\n".encode(errors="surrogateescape"))
            if file.suffix != ".yaml":
                continue
            try:
                name = _name_in(file)
                outside |= _includes(file, {file.resolve()})
            except Exception as error:  # from yaml or lm-eval
                broken[file] = _problem(error)
                continue
            if name in seen:
                twice[name] = seen[name], file
            elif name:
                seen[name] = file
        for name in seen.keys() & twice.keys():
            if twice[name][0] != seen[name]:  # defined twice in an earlier folder, which this one overrides
                del twice[name]
        inside = path.resolve()
        for file in sorted(file for file in outside if not file.is_relative_to(inside)):
            sha.update(f"{file.name}\0{file_sha256(file)}\n".encode(errors="surrogateescape"))
    index = _manager(paths, defaults=False).task_index
    groups = frozenset(name for name, entry in index.items() if entry.kind.name == "GROUP")
    files = {name: entry.yaml_path for name, entry in index.items()}
    return TaskFolders(paths, files, groups, broken, twice, sha.hexdigest())


def _manager(paths: tuple[Path, ...], defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    try:
        with silence_lm_eval():
            return TaskManager(include_defaults=defaults, include_path=list(paths))
    except Exception as error:  # such as a name that is no string
        raise DataError(
            f"lm-eval cannot list the tasks in {paths[-1]}: {type(error).__name__}: {first_line(error)}",
            f"lm_eval ls tasks --include_path {paths[-1]}",
        ) from error


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder that determine its tasks, in a fixed order; links to folders are not followed."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise DataError(f"the folder of tasks {folder} {what}", _EXPECTED)

    def unreadable(error: OSError) -> None:
        raise DataError(
            f"the folder of tasks {error.filename} cannot be read: {error.strerror}", "check its permissions"
        )

    count = 0
    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(set(folders) - _IGNORED_FOLDERS)
        count += len(files)
        if count > _MOST_FILES:
            raise DataError(f"the folder of tasks {folder} holds more than {_MOST_FILES:,} files", _EXPECTED)
        for name in sorted(files):
            path = Path(parent) / name
            if path.suffix in _CONTENT and _is_readable(path):
                yield path


def _is_readable(path: Path) -> bool:
    """Refuse irregular or too large task files, at which lm-eval would hang; skip other such files."""
    try:
        check_regular(path, path.stat())
        if path.suffix in _READ:
            read_bytes(path)
    except OSError as error:
        if path.suffix not in _READ:
            return False
        raise DataError(f"the task file {path} cannot be read: {error.strerror}", "remove it") from None
    return True


def _name_in(path: Path) -> str | None:
    """Return the task or group that a file defines, or ``None`` if it is only included by others.

    Raises:
        Exception: the file or an included one cannot be read, or the name is no string.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    found = load_yaml(path, resolve_func=False)
    name = found.get("group", found.get("task"))
    if name is not None and not isinstance(name, str):
        raise ValueError(f"its name is {name!r}, expected a string")
    return name


def _includes(path: Path, seen: set[Path]) -> set[Path]:
    """Return all files that a task file includes, also indirectly, and the Python modules in their folders."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    official = Path(lm_eval.tasks.__file__).parent
    included = load_yaml(path, resolve_func=False, recursive=False).get("include") or []
    found: set[Path] = set()
    for name in included if isinstance(included, list) else [included]:
        file = (path.parent / name).resolve()
        if file in seen or file.is_relative_to(official):  # lm-eval's version determines its own files
            continue
        seen.add(file)
        found |= {file, *(module for module in file.parent.glob("*.py") if module.is_file())} | _includes(file, seen)
    return found


def _problem(error: Exception) -> str:
    """Describe the error of a YAML file in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}: {getattr(error, 'problem', None) or 'not YAML'}"
    if isinstance(error, FileNotFoundError):
        return f"it includes {error.filename}, which does not exist"
    return first_line(error)
