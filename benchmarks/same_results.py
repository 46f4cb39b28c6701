"""Compare the results of two trees of this code: the same commands and inputs, every file and every document.

    python benchmarks/same_results.py --before TREE --after TREE
    python benchmarks/same_results.py --before TREE --save before.json
    python benchmarks/same_results.py --against before.json --after TREE --models tiny --allow 'remedy'

Each tree runs the commands of ``same_commands.py`` in a fresh folder. It compares tensors (names, order, bytes), the
parsed ``--json`` document and the exit code of every command, every JSON file, and the checksums of all other files,
but no times, memory or speeds. Each difference is one line. The exit code is 1 if there are differences.

A saved document is valid for one machine only: floating-point results differ between processors.
This script's own tree makes the tiny models, so the compared trees need no tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parent.parent
# No network, fixed seeds; set before any library is imported.
_SETTINGS = {
    "COLUMNS": "120",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def main() -> None:
    """Run the trees, compare, print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, metavar="TREE", help="root of the code before")
    parser.add_argument("--after", type=Path, metavar="TREE", help="root of the code after")
    parser.add_argument("--models", choices=["tiny", "demo", "all"], default="tiny")
    parser.add_argument("--case", action="append", help="only this case of --models; may be repeated")
    parser.add_argument("--save", type=Path, metavar="FILE", help="store what --before gave")
    parser.add_argument("--against", type=Path, metavar="FILE", help="take what --before gave from this file")
    parser.add_argument("--allow", action="append", default=[], metavar="FIELD", help="pattern of a key or of a path")
    parser.add_argument("--most", type=int, default=100, help="differences to print")
    parser.add_argument("--jobs", type=int, default=2, help="tiny models at a time, a thread each")
    parser.add_argument("--folder", type=Path, help="keep the working folders here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _run_commands(arguments.child)
        return
    if (arguments.before is None) == (arguments.against is None):
        parser.error("give either --before TREE or --against FILE")
    sys.path.insert(0, str(_REPOSITORY))
    if arguments.against:
        before = json.loads(arguments.against.read_text(encoding="utf-8"))
    else:
        before = run_tree(arguments.before, "before", arguments)
    if arguments.save:
        arguments.save.write_text(json.dumps(before, indent=1) + "\n", encoding="utf-8")
    if arguments.after:
        sys.exit(_compare(before, run_tree(arguments.after, "after", arguments), arguments))


def run_tree(tree: Path, label: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all cases with the code of ``tree``; returns the processor, and case → commands and files."""
    from benchmarks.same_commands import CASES, TINY, prepare

    wanted = {"tiny": list(TINY), "demo": ["demo"], "all": list(CASES)}[arguments.models]
    wanted = [case for case in wanted if case in (arguments.case or wanted)]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="same-results-") as temporary:
        root = (arguments.folder or Path(temporary)).resolve() / label
        for case in wanted:  # one after the other: a random seed belongs to the whole process
            prepare(case, root / case)
        small = [case for case in wanted if case in TINY]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            found = dict(zip(small, pool.map(partial(_case, tree.resolve(), root, 1), small), strict=True))
        found |= {case: _case(tree.resolve(), root, 2, case) for case in wanted if case not in TINY}
    print(f"{label}: {time.monotonic() - start:.0f} s", flush=True)
    return {"processor": processor(), "cases": found}


def processor() -> str:
    """Return the name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def environment(tree: Path, threads: int) -> dict[str, str]:
    """Return the environment in which Python imports the code of ``tree`` and computes with ``threads`` threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **_SETTINGS, **dict.fromkeys(names, str(threads)), "PYTHONPATH": str(tree)}


def _case(tree: Path, root: Path, threads: int, case: str) -> dict[str, Any]:
    """Run the commands of one case in a fresh folder, in one child process that forks for each."""
    from benchmarks.same_commands import commands
    from benchmarks.same_documents import document

    folder = root / case
    settings = {"ARA_DATA_DIR": str(folder / "data"), "ARA_CACHE_DIR": str(folder / "cache")}
    if case == "demo":
        _link_demo(folder / "cache")
    todo = folder.with_suffix(".commands.json")
    todo.write_text(json.dumps(commands(case)), encoding="utf-8")
    child = [sys.executable, str(Path(__file__).resolve()), "--child", str(todo)]
    subprocess.run(child, check=True, cwd=folder, env={**environment(tree, threads), **settings})
    rows = json.loads(todo.with_suffix(".done").read_text(encoding="utf-8"))
    ran = {f"{number:02d} {shlex.join(row.pop('words'))}": row for number, row in enumerate(rows, 1)}
    print(f"  {case}: {len(ran)} commands, {sum(row['seconds'] for row in rows):.0f} s", flush=True)
    for name, row in ran.items():
        if row["exit"]:
            print(f"    exit {row['exit']}: {name}: {row['error']}", flush=True)
    return document(folder, ran)


def _link_demo(cache: Path) -> None:
    """Reuse the downloaded model of the demo; it is converted again."""
    from ara.models.cache import cache_dir

    (cache / "demo").mkdir(parents=True)
    for path in (cache_dir() / "demo").glob("*.gguf"):
        (cache / "demo" / path.name).symlink_to(path)


def _compare(before: dict[str, Any], after: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Print all differences; returns the exit code."""
    from benchmarks.same_documents import differences

    if before["processor"] != after["processor"]:
        print(f"note: before was run on {before['processor']}, after on {after['processor']}")
    ours = {case: before["cases"].get(case, {}) for case in after["cases"]}
    found = list(differences(ours, after["cases"], arguments.allow))
    print(*found[: arguments.most], sep="\n")
    commands = sum(len(case["commands"]) for case in after["cases"].values())
    files = sum(len(case["files"]) for case in after["cases"].values())
    print(f"{len(found)} differences in {commands} commands and {files} files")
    return 1 if found else 0


def _run_commands(todo: Path) -> None:
    """Child process: run every command in a fork, so that libraries are imported once."""
    sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).resolve().parent)]
    import onnxruntime
    import torch
    import transformers

    # Lazy modules of transformers, so that each fork need not import them again.
    assert onnxruntime and torch and transformers.AutoModelForCausalLM and transformers.LlamaForCausalLM
    tree = Path(os.environ["PYTHONPATH"])
    found = importlib.util.find_spec("ara_cli")
    assert found and found.origin and Path(found.origin).is_relative_to(tree), f"{found} is not the code of {tree}"
    rows = []
    for words in json.loads(todo.read_text(encoding="utf-8")):
        start = time.monotonic()
        rows.append({"words": words, **_forked(words), "seconds": time.monotonic() - start})
    todo.with_suffix(".done").write_text(json.dumps(rows), encoding="utf-8")


def _forked(words: list[str]) -> dict[str, Any]:
    """Run ``python -m ara_cli`` with these arguments in a fork; returns stdout, the exit code and the last error."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as told, open(os.devnull) as nothing:
        pid = os.fork()
        if pid == 0:
            for descriptor, file in enumerate((nothing, out, told)):
                os.dup2(file.fileno(), descriptor)
            os._exit(_as_program(words))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        told.seek(0)
        errors = [line for line in told.read().decode().splitlines() if line.startswith(("error:", "Error"))]
        return {"stdout": out.read().decode(), "exit": code, "error": errors[-1] if errors else None}


def _as_program(words: list[str]) -> int:
    sys.argv = ["ara", *words]
    try:
        runpy.run_module("ara_cli", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        print(f"Error: {error!r}", file=sys.stderr)
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    main()
