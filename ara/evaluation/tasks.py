"""Tasks of lm-eval: their names, and how they are loaded.

If ``$ARA_DATA_DIR`` is set, the tasks of :data:`LOCAL` read their questions there: a short definition includes the file
of lm-eval and replaces only the data source. All other tasks read the Hugging Face hub, as lm-eval defines.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ara.data.filespecs import FILE_PREFIX
from ara.data.texts import DATA_DIR_VARIABLE, TEXTS, check_text_spec, data_dir, is_chat, silence_datasets
from ara.errors import AraError, DataError, UsageError, first_line, near_matches
from ara.evaluation.silence import silence_lm_eval
from ara.evaluation.task_folders import TaskFolders
from ara.models.cache import cache_dir
from ara.progress import SILENT, Reporter

# The seven tasks that ARA, SVD-LLM and other papers use.
ZERO_SHOT = ("arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "openbookqa", "mathqa")
GROUPS = {"zero-shot": ZERO_SHOT}


@dataclass(frozen=True)
class LocalData:
    """Location of a task's questions below ``$ARA_DATA_DIR``.

    Attributes:
        definition: lm-eval's file of the task, relative to its folder of tasks.
        split: the split that holds them.
        file: of JSON lines.
        hub: the same data set on the Hugging Face hub.
    """

    definition: str
    split: str
    file: str
    hub: str


LOCAL = {
    "arc_easy": LocalData("arc/arc_easy.yaml", "test", "arc_easy/test.jsonl", "allenai/ai2_arc"),
    "arc_challenge": LocalData("arc/arc_challenge.yaml", "test", "arc_challenge/test.jsonl", "allenai/ai2_arc"),
    "piqa": LocalData("piqa/piqa.yaml", "validation", "piqa/validation.jsonl", "baber/piqa"),
    "hellaswag": LocalData("hellaswag/hellaswag.yaml", "validation", "hellaswag/validation.jsonl", "Rowan/hellaswag"),
    "winogrande": LocalData(
        "winogrande/default.yaml", "validation", "winogrande/validation.jsonl", "allenai/winogrande"
    ),
    "openbookqa": LocalData("openbookqa/openbookqa.yaml", "test", "openbookqa/test.jsonl", "allenai/openbookqa"),
    "mathqa": LocalData("mathqa/mathqa.yaml", "test", "mathqa/test.jsonl", "regisss/math_qa"),
    "lambada_openai": LocalData(
        "lambada/lambada_openai.yaml", "test", "lambada_openai/test.jsonl", "EleutherAI/lambada_openai"
    ),
    "wikitext": LocalData(
        "wikitext/wikitext.yaml", "test", "wikitext2_raw/test_documents.jsonl", "EleutherAI/wikitext_document_level"
    ),
}
_SPLITS = ("training", "validation", "test")


@dataclass(frozen=True, eq=False)
class Task:
    """A loaded task.

    Attributes:
        name: name in lm-eval.
        definition: lm-eval's object.
        documents: number of questions.
        origin: source of the questions, in words.
        digest: sha256 (hex) over the questions.
    """

    name: str
    definition: Any
    documents: int
    origin: str
    digest: str


def is_text(name: str) -> bool:
    """Tell whether ``name`` is a plain text, for perplexity, and neither a task nor conversations."""
    return name.startswith(FILE_PREFIX) or (name in TEXTS and not is_chat(name))


def expand(names: Sequence[str], own: TaskFolders | None = None) -> tuple[str, ...]:
    """Replace groups of :data:`GROUPS`, unless the user defines the name, by their tasks; remove duplicates."""
    groups = {name: tasks for name, tasks in GROUPS.items() if own is None or name not in own}
    return tuple(dict.fromkeys(task for name in names for task in groups.get(name, (name,))))


def mean_label(tasks: Iterable[str]) -> str:
    """Return the label of a mean over these tasks."""
    names = set(tasks)
    return "mean of zero-shot" if names == set(ZERO_SHOT) else f"mean of {len(names)} tasks"


def check_task(name: str, report: Reporter = SILENT, own: TaskFolders | None = None) -> None:
    """Check that a text, conversations or a task exist, without reading its questions or running its code.

    Args:
        name: of a text, conversations, a task, or one of lm-eval's groups or tags.
        report: receives progress.
        own: folders with the user's tasks, which have priority.

    Raises:
        DataError: there is no such task, the file below ``$ARA_DATA_DIR`` is missing, or the task file cannot be read.
        UsageError: the user's task has the name of a text.
    """
    if own is not None:
        own.check(name)
        if name in own:
            if is_text(name) or is_chat(name):
                raise UsageError(
                    f"{name!r} is a text of ara, and a task in {own.file_of(name)}", "give the task another name"
                )
            return
    if is_text(name) or is_chat(name):
        check_text_spec(name)
        return
    if name in LOCAL:
        _local_file(name)
        return
    report.fact(f"looking for {name} among the tasks of lm-eval")
    known = _index().all_tasks
    if name not in known:
        near = near_matches(name, [*TEXTS.names(), *GROUPS, *(own.files if own else ()), *known])
        raise DataError(
            f"there is no text or lm-eval task {name!r}",
            f"{near}texts: {', '.join(TEXTS.names())}, file:PATH, chat:PATH; tasks: {', '.join(GROUPS)}, "
            f"{', '.join(LOCAL)}, and all others that `lm_eval ls tasks` lists",
        )


def load_tasks(name: str, report: Reporter = SILENT, own: TaskFolders | None = None) -> list[Task]:
    """Load a task, or all tasks of one of lm-eval's groups or tags.

    Args:
        name: of the task, group or tag.
        report: receives progress.
        own: folders with the user's tasks, which have priority; Python code named in these tasks is executed.

    Raises:
        UsageError: the task would execute code that a model writes.
        DataError: there is no such task, or its questions cannot be read or fetched.
    """
    check_task(name, report, own)
    if own is not None and name in own:
        if name in LOCAL:
            report.warn(f"{name} is the task in {own.file_of(name)}, not the task of lm-eval")
        report.fact(f"reading the questions of {name} (task file {own.file_of(name)})")
        return _own_tasks(name, own)
    file = _local_file(name) if name in LOCAL else None
    report.fact(f"reading the questions of {name}" + ("" if file else " (Hugging Face hub)"))
    try:
        with silence_datasets(), silence_lm_eval():
            origin = f"file {file}" if file else None
            return [_task(found, definition, origin) for found, definition in _load(name).items()]
    except AraError:
        raise
    except ImportError as error:
        raise missing_module(f"task {name}", error) from error
    except Exception as error:  # from datasets, huggingface_hub or lm-eval
        what = f"the questions of {name} cannot be "
        if file:
            told, hint = f"{what}used: {first_line(error)}", f"check that {file} is the data of {LOCAL[name].hub}"
            raise DataError(told, hint) from error
        if name in LOCAL:
            hint = f"set {DATA_DIR_VARIABLE} (needs {LOCAL[name].file}), or go online"
        else:
            hint = f"go online, or use a task with local data ({DATA_DIR_VARIABLE}): {', '.join(LOCAL)}"
        told = f"{what}fetched from the Hugging Face hub ({type(error).__name__}: {first_line(error)})"
        raise DataError(told, hint) from error


def _own_tasks(name: str, own: TaskFolders) -> list[Task]:
    """Load a task of the user; errors name its file."""
    path = own.file_of(name)
    try:
        with silence_datasets(), silence_lm_eval():
            loaded = own.manager(name).load(name)["tasks"]
            return [
                _task(found, definition, f"file {own.files[found]}" if own.files.get(found) else None)
                for found, definition in loaded.items()
            ]
    except AraError:
        raise
    except (Exception, SystemExit) as error:  # its code may raise anything
        raise DataError(
            f"task {name} of {path} cannot be loaded: {type(error).__name__}: {first_line(error)}",
            f"correct it, and check it with `lm_eval validate --tasks {name} --include_path {own.paths[-1]}`",
        ) from error


def _task(name: str, definition: Any, origin: str | None) -> Task:
    """Return a task of lm-eval; ``origin`` is the source of its questions, ``None`` for the hub.

    Raises:
        UsageError: it would execute code that a model writes.
        DataError: it has no questions.
    """
    if getattr(definition, "UNSAFE_CODE", False):
        raise UsageError(f"task {name} executes code that the model writes", "run it with lm_eval, in a sandbox")
    documents = definition.eval_docs
    if len(documents) == 0:
        raise DataError(f"task {name} has no questions ({origin or definition.DATASET_PATH})", "omit it")
    origin = origin or f"Hugging Face hub {definition.DATASET_PATH}"
    return Task(name, definition, len(documents), origin, _digest(documents))


def missing_module(who: str, error: ImportError) -> DataError:
    """Return the error for a task ``who`` that needs a missing Python module."""
    cause: BaseException | None = error
    while isinstance(cause, ImportError) and not cause.name:  # lm-eval wraps the original error
        cause = cause.__cause__ or cause.__context__
    name = cause.name if isinstance(cause, ImportError) else None
    if isinstance(cause, ModuleNotFoundError) and name:
        package = name.partition(".")[0]
        return DataError(f"{who} needs the Python module {package}, which is not installed", f"pip install {package}")
    return DataError(
        f"{who} needs a Python module that cannot be imported: {first_line(error)}", "install that module with pip"
    )


def definition(name: str) -> str:
    """Return the definition (YAML) of a task of :data:`LOCAL`: lm-eval's own, with local data if available.

    Raises:
        DataError: the file below ``$ARA_DATA_DIR`` is missing.
    """
    import lm_eval.tasks

    file, local = _local_file(name), LOCAL[name]
    official = Path(lm_eval.tasks.__file__).parent / local.definition
    lines = [f"include: {json.dumps(str(official))}", f"task: {name}"]
    if file:
        source = {"data_files": {local.split: str(file)}, "cache_dir": str(cache_dir() / "tasks")}
        lines += ["dataset_path: json", "dataset_name: null", f"dataset_kwargs: {json.dumps(source)}"]
        # lm-eval must not look for few-shot examples in missing splits.
        lines += [f"{split}_split: null" for split in _SPLITS if split != local.split]
    return "\n".join(lines) + "\n"


def chosen_documents(task: str, documents: int, limit: int | None, seed: int) -> list[int] | None:
    """Return the numbers of the questions to ask, ascending, drawn without replacement; ``None`` for all.

    Args:
        task: name of the task; it makes the sample differ between tasks.
        documents: number of questions.
        limit: number of questions to ask; ``None`` for all.
        seed: random seed.
    """
    if limit is None or limit >= documents:
        return None
    return sorted(random.Random(f"{seed} {task}").sample(range(documents), limit))


def _digest(documents: Iterable[Mapping[str, Any]]) -> str:
    sha = hashlib.sha256()
    for document in documents:
        sha.update(json.dumps(document, sort_keys=True, default=str).encode())
    return sha.hexdigest()


def _local_file(name: str) -> Path | None:
    """Return the file of a task below ``$ARA_DATA_DIR``, or ``None`` if the variable is not set."""
    folder = data_dir()
    if folder is None:
        return None
    path = folder / LOCAL[name].file
    if not path.is_file():
        raise DataError(
            f"task {name!r}: no file {path} ({DATA_DIR_VARIABLE} is {folder})",
            f"add it (JSON lines of {LOCAL[name].hub}), or unset {DATA_DIR_VARIABLE} to fetch the questions",
        )
    return path.resolve()


def _load(name: str) -> dict[str, Any]:
    if name not in LOCAL:
        return dict(_index().load(name)["tasks"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"{name}.yaml").write_text(definition(name), encoding="utf-8")
        return {name: _manager(folder).load(name)["tasks"][name]}


@cache
def _index() -> Any:
    """Return lm-eval's index of its own tasks; made once, which takes ten seconds."""
    return _manager(None)


def _manager(folder: str | None) -> Any:
    """Return lm-eval's index of the tasks in ``folder``, or of its own tasks."""
    from lm_eval.tasks import TaskManager

    with silence_lm_eval():
        return TaskManager(include_defaults=folder is None, include_path=folder)
