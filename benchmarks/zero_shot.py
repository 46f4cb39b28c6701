"""Zero-shot accuracy of SmolLM2-135M: dense, uniform ranks and chosen ranks, on the same questions, in pairs.

    ARA_DATA_DIR=... make bench-zero-shot
    python benchmarks/zero_shot.py --workspace WS --checkpoint NAME --limit 400
    python benchmarks/zero_shot.py --workspace WS --checkpoint NAME --tasks wikitext --limit 8    # whole articles

Without --checkpoint the pipeline runs first with its default settings: two-sided factors, ranks by the sensitivity
table at --keep, and a repair up to the level --recover ("none" measures the truncated model). The checkpoint before
the repair is measured beside it. Afterwards lm-eval's own command asks the dense model the same questions, in a
separate process. The last table shows how many of them get the same score from both. The script fails if an accuracy
differs by more than one standard error, or if the questions differ.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ara.artifacts.evaluation import EvaluationResults
from ara.config import AllocateConfig, DecomposeConfig, EvalConfig, RecoverConfig, TruncateConfig
from ara.evaluation.tasks import LOCAL, definition, expand, is_text
from ara.layout_names import DEFAULT_LAYOUT, LAYOUT_NAMES
from ara.models.placement import torch_dtype
from ara.stages.allocate import allocate
from ara.stages.common import Run, model_of
from ara.stages.decompose import decompose
from ara.stages.evaluate import evaluate
from ara.stages.recover import recover
from ara.stages.truncate import truncate
from ara.workspace.view import StageView
from ara_cli.console import Column, Console
from ara_cli.render_eval import show_evaluation

TASKS = "zero-shot,lambada_openai"


def main() -> None:
    """Measure, print the tables, check the dense column."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="model to compress")
    parser.add_argument("--keep", type=float, default=0.8, help="budget")
    parser.add_argument("--layout", default=DEFAULT_LAYOUT, choices=LAYOUT_NAMES, help="of low-rank layers")
    parser.add_argument(
        "--recover", default=RecoverConfig.model_fields["level"].default, help="level of the repair, or none"
    )
    parser.add_argument("--tasks", default=TASKS, help="with commas")
    parser.add_argument("--limit", type=int, default=400, help="questions per task")
    parser.add_argument("--batch-size", type=int, default=8, help="texts per forward pass")
    parser.add_argument("--checkpoint", help="NAME or STAGE/NAME of a checkpoint in the workspace [default: made here]")
    parser.add_argument("--beside", action="append", default=[], help="STAGE/NAME of a further checkpoint; repeatable")
    parser.add_argument("--no-check", action="store_true", help="do not run lm-eval's own command")
    parser.add_argument("--workspace", type=Path, default=Path("bench-zero-shot"), help="where to work")
    arguments = parser.parse_args()
    if "ARA_DATA_DIR" not in os.environ:
        sys.exit("error: ARA_DATA_DIR is not set\nhint: point it at a folder with arc_easy/, piqa/, …")
    console = Console()
    run = Run(arguments.workspace, "python benchmarks/zero_shot.py", console)
    if arguments.checkpoint is None:
        decompose(DecomposeConfig(model=arguments.model), run)
        chosen = allocate(AllocateConfig(keep=arguments.keep, method="sensitivity", layout=arguments.layout), run)
        made = truncate(TruncateConfig(), run, allocation=chosen.name)
        if arguments.recover != "none":
            arguments.beside.append(made.key)
            made = recover(RecoverConfig(level=arguments.recover), run, checkpoint=made.key)
        arguments.checkpoint = made.key
    names = tuple(arguments.tasks.split(","))
    config = EvalConfig(tasks=names, limit=arguments.limit, batch_size=arguments.batch_size)
    view = evaluate(config, run, checkpoint=arguments.checkpoint, beside=arguments.beside)
    show_evaluation(console, view)
    if not arguments.no_check:
        check(view, run, console)


def check(view: StageView, run: Run, console: Console) -> None:
    """Ask the dense model the same questions by lm-eval's command, and compare."""
    factors = run.open().ancestor(view, "factors")
    assert view.manifest is not None
    config = view.manifest.config
    tasks = [name for name in expand(config["tasks"]) if not is_text(name) and name in LOCAL]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = model_of(factors, run)
        model, tokenizer = source.load_model(torch_dtype(config["dtype"])), source.load_tokenizer()
        model.save_pretrained(folder / "dense")
        tokenizer.save_pretrained(folder / "dense")
        del model
        (folder / "tasks").mkdir()
        for name in tasks:
            (folder / "tasks" / f"{name}.yaml").write_text(definition(name), encoding="utf-8")
        questions = json.dumps({name: [answer["document"] for answer in answers(view, name)] for name in tasks})
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", config["device"]]
        command += ["--model_args", f"pretrained={folder / 'dense'},dtype={config['dtype']}"]
        command += ["--include_path", str(folder / "tasks"), "--tasks", *tasks]
        command += ["--samples", questions, "--batch_size", str(config["batch_size"]), "--log_samples"]
        subprocess.run([*command, "--output_path", str(folder / "out.json")], check=True)
        (written,) = folder.glob("out*.json")
        theirs = json.loads(written.read_text(encoding="utf-8"))["results"]
        logged = {name: samples(folder, name) for name in tasks}
    rows, off = [], []
    for name in tasks:
        task = EvaluationResults.read(view).harness[name]
        row, metric = task.models["dense"], task.metric
        other = theirs[name][f"{metric},none"]
        distance = abs(row.value - other)
        # Perplexities have no standard error here: they may differ by 1 %.
        allowed = row.stderr if row.stderr is not None else 0.01 * other
        off += [name] if distance > allowed else []
        figures = (f"{row.value:.4f}", f"{other:.4f}", f"{distance:.4f}", f"{allowed:.4f}")
        ours = answers(view, name)
        rows.append((name, metric, *figures, f"{agreeing(ours, logged[name], metric, name)} of {len(ours)}"))
    columns = [Column("task", "left"), Column("metric", "left"), Column("ara"), Column("lm-eval's command")]
    columns += [Column("difference"), Column("allowed"), Column("questions that agree")]
    console.table("The dense model", columns, rows)
    if off:
        sys.exit(f"error: {', '.join(off)}: the dense column is not what lm-eval's command says")


def answers(view: StageView, task: str) -> list[dict[str, Any]]:
    """Return the dense model's answers, question by question."""
    (path,) = view.path.glob(f"[0-9][0-9]-{task}.0-dense.json")
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["answers"]
    return found


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    """Return the samples of a task that lm-eval's command has logged, question by question."""
    (path,) = folder.glob(f"samples_{task}_[0-9]*.jsonl")
    # Not splitlines: questions may contain other line separators.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def agreeing(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], metric: str, task: str) -> int:
    """Return how many questions have the same value of ``metric`` here and in the samples of lm-eval's command.

    Right and wrong must be equal; log-likelihoods may differ by 0.1 %, as they do between batches of another order.
    Of several filters the first counts.

    Raises:
        SystemExit: it was asked other questions.
    """
    first = [row for row in theirs if row["filter"] == theirs[0]["filter"]]
    others = {int(row["doc_id"]): row for row in first}
    if {answer["document"]: answer["digest"] for answer in ours} != {n: row["doc_hash"] for n, row in others.items()}:
        sys.exit(f"error: {task}: lm-eval's command was asked other questions\nhint: measure again with --force")
    return sum(_same(answer["metrics"][metric], others[answer["document"]][metric]) for answer in ours)


def _same(one: Any, other: Any) -> bool:
    """Compare two values of one metric as JSON has them."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-3)
    return bool(one == other)


if __name__ == "__main__":
    main()
