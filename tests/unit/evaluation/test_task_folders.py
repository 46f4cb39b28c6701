"""Tasks of one's own: found, keyed by their content, run; and whatever is wrong with them is told with their file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ara.errors import DataError, UsageError
from ara.evaluation import tasks
from ara.evaluation.harness import ask
from ara.evaluation.task_folders import TaskFolders, open_task_folders
from ara.evaluation.tasks import check_task, expand, load_tasks
from tests.recorder import Recorder
from tests.tiny import tiny_model, tiny_tokenizer

_TASK = """
task: {name}
tag: mine_all
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: !function code.prompt
doc_to_choice: ["yes", "no"]
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""
_CODE = """
from pathlib import Path
(Path(__file__).parent / "ran").touch()


def prompt(doc):
    return "Is it " + doc["goal"]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with one good task, ``mine``, whose code leaves a file ``ran`` behind."""
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"goal": f"goal {n}", "label": n % 2}) + "\n" for n in range(6)))
    made = tmp_path / "tasks"
    (made / "deep").mkdir(parents=True)
    (made / "deep" / "mine.yaml").write_text(_TASK.format(name="mine", data=data, cache=tmp_path / "cache"))
    (made / "deep" / "code.py").write_text(_CODE)
    monkeypatch.setattr(tasks, "_index", lambda: pytest.fail("all of lm-eval's tasks were looked through"))
    return made


def _opened(*folders: Path) -> TaskFolders:
    found = open_task_folders([str(folder) for folder in folders])
    assert found is not None
    return found


def _more(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_task_of_the_user_is_loaded_and_asked(folder: Path) -> None:
    assert open_task_folders([]) is None
    own = _opened(folder)
    check_task("mine", own=own)
    check_task("mine_all", own=own)
    assert not (folder / "deep" / "ran").exists(), "code ran before its task was loaded"
    (task,) = load_tasks("mine", own=own)
    assert (folder / "deep" / "ran").exists()
    assert (task.name, task.documents, task.origin) == ("mine", 6, f"file {folder}/deep/mine.yaml")
    assert [found.name for found in load_tasks("mine_all", own=own)] == ["mine"]
    score = ask(tiny_model("llama"), tiny_tokenizer(), task, [0, 1, 3], label="mine")
    assert score.headline == "acc" and len(score.answers) == 3


def test_the_digest_is_that_of_the_content(folder: Path, tmp_path: Path) -> None:
    digest = _opened(folder).digest
    (folder / "deep" / "__pycache__").mkdir(exist_ok=True)
    (folder / "deep" / "__pycache__" / "code.py").write_text("x")
    (folder / "notes.log").write_text("x")
    assert _opened(folder).digest == digest
    moved = folder.rename(tmp_path / "elsewhere")
    assert _opened(moved).digest == digest
    (tmp_path / "common").mkdir()
    shared = _more(tmp_path / "common", "shared.yaml", "test_split: test\n")
    digests = {digest}
    for path, text in (
        (moved / "deep" / "code.py", _CODE + "\n"),
        (moved / "more.yaml", "include: ../common/shared.yaml\ntask: more\n"),
        (shared, "test_split: validation\n"),
        (tmp_path / "common" / "code.py", "x = 1\n"),
        (moved / "examples.json", "[]"),
        (moved / "renamed.json", "[]"),
    ):
        path.write_text(text)
        digests.add(_opened(moved).digest)
    assert len(digests) == 7


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("bad.yaml", "task: bad\n  doc: [", r"task 'bad': .*bad\.yaml cannot be read: line 2: "),
        ("x.yaml", "task: bad\n- 3\n", r"task 'bad': .*x\.yaml cannot be read: line 2: "),
        ("bad.yaml", "include: none.yaml\ntask: bad\n", r"it includes .*none\.yaml, which does not exist"),
        ("bad.yaml", "include: bad.yaml\ntask: bad\n", r"bad\.yaml cannot be read: Include cycle"),
        ("bad.yaml", "task: bad\nx: !unknown y\n", r"bad\.yaml cannot be read: line 2: could not determine"),
        ("bad.yaml", "- bad\n", r"bad\.yaml cannot be read: Expected YAML dict"),
        ("bad.yaml", "[" * 2000, r"bad\.yaml cannot be read: "),
        ("bad.yaml", "task: bad\n", r"task bad of .*bad\.yaml cannot be loaded: "),
        ("bad.yaml", "task: bad\ndoc_to_text: !function gone.f\n", r"cannot be loaded: ImportError: .*'gone'"),
        ("bad.yaml", "task: bad\ndoc_to_text: !function leaves.f\n", "cannot be loaded: SystemExit: 3"),
        ("bad.yaml", "task: bad\nclass: !function leaves.f\n", "cannot be loaded: SystemExit: 3"),
        ("bad.yaml", "task: bad\ndataset_path: json\ndataset_kwargs: {data_files: /none.jsonl}\n", "cannot be loaded"),
    ],
)
def test_a_broken_task_is_told_with_its_file(folder: Path, name: str, text: str, words: str) -> None:
    (folder / "leaves.py").write_text("raise SystemExit(3)")
    _more(folder, name, text)
    own = _opened(folder)
    check_task("mine", own=own)
    with pytest.raises(DataError, match=words) as caught:
        load_tasks("bad", own=own)
    assert "\n" not in str(caught.value) and caught.value.hint


def test_a_task_without_questions_or_with_code_that_fails(folder: Path) -> None:
    own = _opened(folder)
    (folder / "deep" / "code.py").write_text(
        "def prompt(doc):\n    return 'x' if doc['goal'] == 'goal 0' else exit('no')\n"
    )
    (task,) = load_tasks("mine", own=own)
    with pytest.raises(DataError, match="lm-eval fails at mine, dense: SystemExit: no"):
        ask(tiny_model("llama"), tiny_tokenizer(), task, [0, 1], label="mine, dense")
    with pytest.raises(DataError, match=r"task mine has no questions \(file mine\.yaml\)"):
        tasks._task("mine", SimpleNamespace(eval_docs=[]), "file mine.yaml")


def test_names_that_stand_for_two_things(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _more(folder, "a.yaml", "task: twin\n")
    _more(folder, "b.yaml", "task: twin\n")
    _more(folder, "c.yaml", "task: c4\n")
    _more(folder, "d.yaml", "task: zero-shot\n")
    text = (folder / "deep" / "mine.yaml").read_text()
    _more(folder / "deep", "piqa.yaml", text.replace("task: mine", "task: piqa"))
    own = _opened(folder)
    with pytest.raises(DataError, match=r"task 'twin' is defined twice: by .*a\.yaml and .*b\.yaml"):
        check_task("twin", own=own)
    with pytest.raises(UsageError, match=r"'c4' is a text of ara, and a task in .*c\.yaml"):
        check_task("c4", own=own)
    assert expand(["zero-shot", "piqa"], own) == ("zero-shot", "piqa")
    recorder = Recorder()
    monkeypatch.setenv("ARA_DATA_DIR", str(tmp_path / "empty"))
    (task,) = load_tasks("piqa", recorder, own)
    assert task.documents == 6
    (said,) = recorder.warnings
    assert said.startswith("piqa is the task in ") and said.endswith("not the task of lm-eval")
    later = tmp_path / "later"
    later.mkdir()
    _more(later, "twin.yaml", "task: twin\n")
    assert _opened(folder, later).files["twin"] == later / "twin.yaml"
    check_task("twin", own=_opened(folder, later))
    with pytest.raises(DataError, match="is defined twice"):
        check_task("twin", own=_opened(later, folder))


def test_folders_that_are_none(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: dict[Path | str, str] = {
        tmp_path / "none": "the folder of tasks .*none does not exist",
        folder / "deep" / "mine.yaml": "the folder of tasks .* is no folder",
    }
    for path, words in cases.items():
        with pytest.raises(DataError, match=words):
            open_task_folders([str(path)])
    with pytest.raises(UsageError, match="--include-path '~no-such-user/x' cannot be used: there is no such user"):
        open_task_folders(["~no-such-user/x"])
    _more(folder, "number.yaml", "task: 5\n")
    with pytest.raises(DataError, match=r"lm-eval cannot list the tasks in .*: TypeError"):
        _opened(folder)
    (folder / "number.yaml").unlink()
    os.mkfifo(folder / "pipe.json")
    _opened(folder)
    os.mkfifo(folder / "pipe.yaml")
    with pytest.raises(DataError, match=r"pipe\.yaml cannot be read: it is a pipe, expected a regular file"):
        _opened(folder)
    (folder / "pipe.yaml").unlink()
    monkeypatch.setattr("ara.evaluation.task_folders._MOST_FILES", 2)
    with pytest.raises(DataError, match="holds more than 2 files"):
        _opened(folder)


def test_a_group_may_hold_tasks_of_lm_eval(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _more(folder, "group.yaml", "group: both\ntask: [mine, piqa]\n")
    made: list[dict[str, Any]] = []

    class Manager:
        def __init__(self, **options: Any) -> None:
            made.append(options)

        def load(self, name: str) -> Any:
            raise ConnectionError(f"no route for {name}\nto host")

    own = _opened(folder)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    with pytest.raises(DataError, match=r"task both of .*group\.yaml cannot be loaded: ConnectionError: no route"):
        load_tasks("both", own=own)
    assert made == [{"include_defaults": True, "include_path": [folder]}]
