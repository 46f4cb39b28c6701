"""Quality per parameter on SmolLM2-135M: every allocator and decomposition, the same budget, the same text.

    ARA_DATA_DIR=... make bench-quality                                          # in ./bench-quality
    python benchmarks/quality.py --seeds 1 --only 'two-sided/*/0.8/*'            # a part of it
    python benchmarks/quality.py --results benchmarks/results/quality.json       # add to the published rows

Factors are calibrated once, on C4 (256 windows of 512 tokens, seed 0). Ranks are learned from other windows of the same
documents. Perplexity is measured on WikiText-2 (test) and on C4 documents that no calibration has seen. Gap closed =
(ln ppl_uniform − ln ppl) / (ln ppl_uniform − ln ppl_dense), where uniform means whitened factors at uniform ranks.
Learned methods run once per seed (batches, drawn targets); tables show the mean and the range. The guard is off.
Every row is stored as soon as it is measured, so an interrupted run continues, also on another machine. Rows with the
same model, text and settings belong together; each names its run. ``benchmarks/quality_table.py`` prints and draws.

At the end ``benchmarks/quality_checks.py`` computes the first windows again, dense and with stored layers, without
code of ARA's evaluation. The results must agree.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ara.config import AllocateConfig, DecomposeConfig, MaskTrainingOptions, TrainMasksConfig
from ara.errors import NumericalError
from ara.layout_names import LAYOUT_NAMES
from ara_cli.console import Console
from benchmarks.quality_checks import check_dense, check_stored
from benchmarks.quality_rows import FORMS, Row, wanted
from benchmarks.quality_table import TABLE_KEEPS, TASKS, show
from benchmarks.row_file import RowFile

if TYPE_CHECKING:
    from ara.solver.problem import Allocation


class Bench:
    """The models, texts and finished rows of one run."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        from ara.stages.common import Run
        from ara.stages.decompose import decompose

        self.arguments, self.console = arguments, console
        self.run = Run(arguments.workspace, "python benchmarks/quality.py", console)
        self.views = {
            # C4 alone, as in all published rows.
            name: decompose(
                DecomposeConfig(model=arguments.model, method=name, samples=arguments.samples, text="c4"), self.run
            )
            for name in ("whitened", "two-sided")
        }
        self.file = RowFile(arguments.results or arguments.workspace / "quality.json", self._facts())
        self.rows = self.file.rows
        self.loaded: str | None = None
        # Probes of the loaded factors; all budgets share them.
        self.measured: dict[str, tuple[Any, float]] = {}

    def _facts(self) -> dict[str, Any]:
        """Return what all rows share: settings, model and factors."""
        made = {name: view.manifest for name, view in self.views.items()}
        recipes = {name: {"fingerprint": m.model["fingerprint"], **m.config} for name, m in made.items() if m}
        settings = {name: getattr(self.arguments, name) for name in ("windows", "seq_len", "steps")}
        return {"settings": settings, "factors": recipes}

    def first_losses(self, key: str, factors: str, ranks: Mapping[str, int | None], windows: int) -> list[float]:
        """Return WikiText-2 losses of the first windows: of row ``key`` if this run has measured it, else measured now.

        Rows of other runs are not used: in bfloat16 another processor rounds differently, more than the checks allow.
        """
        if self.file.measured_now(key):
            return list(self.rows[key]["wikitext2_windows"][:windows])
        self.load(factors)
        model = self.context.model
        model.use(ranks)
        losses = model.nll(self.texts["wikitext2"].ids[:windows], 1)
        model.use_dense()
        return [float(loss) for loss in losses]

    def load(self, factors: str) -> None:
        """Load a model with these factors, and the texts."""
        from ara.artifacts.factors import specs_of
        from ara.data.texts import load_documents
        from ara.data.tokens import evaluation_windows
        from ara.stages.common import model_of
        from ara.stages.tuning import open_tuning_context, placed

        if self.loaded == factors:
            return
        view, workspace = self.views[factors], self.run.open()
        config = placed(AllocateConfig(), self.run)
        self.context = open_tuning_context(view, specs_of(view), config, workspace, self.run)
        tokenizer = model_of(view, self.run).load_tokenizer()
        limit, length = self.arguments.windows, self.arguments.seq_len
        self.texts = {
            task: evaluation_windows(load_documents(task, "evaluation"), tokenizer, seq_len=length, max_windows=limit)
            for task in TASKS
        }
        self.loaded, self.measured = factors, {}

    def quality(self, ranks: Mapping[str, int | None]) -> dict[str, Any]:
        """Return losses on held-out calibration text and on the evaluation texts, nats per token."""
        model, context = self.context.model, self.context
        model.use(ranks)
        found: dict[str, Any] = {"held_out": float(model.nll(context.held_out).mean())}
        for task, text in self.texts.items():
            losses = model.nll(text.ids, 1, self.console, f"Reading {task}")
            found[task] = float(losses.mean())
            found[f"{task}_windows"] = [round(loss, 6) for loss in losses.tolist()]
        model.use_dense()
        return found

    def dense(self) -> None:
        """Measure the dense model."""
        if "dense" not in self.rows:
            self.load("whitened")
            self.file.keep("dense", self.quality({spec.name: None for spec in self.context.model.specs}))

    def measure(self, row: Row) -> None:
        """Allocate and measure one row, unless it is there already."""
        from ara.artifacts.factors import specs_of

        if row.key in self.rows:
            return
        self._refuse_mixture(row)
        self.console.step(row.key)
        self.load(row.factors)
        try:
            allocation, facts = self._allocation(row)
        except NumericalError as error:
            self.console.warn(f"{row.key}: {error}")
            self.file.keep(row.key, {"error": str(error)})
            return
        facts["linear_keep"] = allocation.keep(specs_of(self.views[row.factors], row.layout))
        facts["dense_layers"] = allocation.dense_count()
        self.file.keep(row.key, {**facts, **self.quality(allocation.ranks)})

    def _settings(self, row: Row) -> dict[str, Any]:
        """Return the fields of a row that describe its training; empty for other methods."""
        if row.method not in FORMS:
            return {}
        options = MaskTrainingOptions(**FORMS[row.method]).model_dump(mode="json")
        if self.arguments.steps:
            options["steps"] = self.arguments.steps
        return {"trained_at": list(self.arguments.keep), "options": options}

    def _refuse_mixture(self, row: Row) -> None:
        """Refuse to average rows of trainings with different settings."""
        asked = self._settings(row)
        for seed in range(self.arguments.seeds):
            key = replace(row, seed=seed).key
            found = self.rows.get(key, {"error": ""})
            if "error" not in found and any(found.get(name) != value for name, value in asked.items()):
                sys.exit(
                    f"error: {key} in {self.file.path} was trained with other settings than {row.key}\n"
                    "hint: remove its rows from the file, or name another file with --results"
                )

    def _allocation(self, row: Row) -> tuple[Allocation, dict[str, Any]]:
        from ara.allocation import ALLOCATORS
        from ara.allocation.probe_based import ProbeBased
        from ara.allocation.sensitivity import Sensitivity, SensitivityOptions, sensitivity_table
        from ara.config import method_options
        from ara.solver.knapsack import best_ranks
        from ara.solver.problem import Budget
        from ara.stages.modules import load_modules

        if row.method in FORMS:
            return self._trained(row)
        kind = ALLOCATORS.load(row.method)
        context = replace(self.context, seed=row.seed)
        modules = load_modules(self.views[row.factors], row.layout)
        specs = [module.spec for module in modules]
        budget = Budget.for_keep(specs, row.keep)
        allocator = kind(method_options(kind.Options, {}))
        passes, begun = context.model.backward_passes, time.monotonic()
        if isinstance(allocator, Sensitivity):
            assert isinstance(allocator.options, SensitivityOptions)
            table = sensitivity_table(context, allocator.options)
            allocation = best_ranks(specs, table.values, budget)
            return allocation, {"seconds": table.seconds, "backward_passes": len(context.train)}
        if isinstance(allocator, ProbeBased):
            probes, seconds = self._once(
                f"{row.method}, {row.layout}", lambda: allocator.probes(specs, budget, context)
            )
            return allocator.choose(specs, probes, budget), {"seconds": seconds, "backward_passes": 0}
        allocation = allocator.allocate(modules, budget, context if allocator.needs_model else None)
        seconds = time.monotonic() - begun
        return allocation, {"seconds": seconds, "backward_passes": context.model.backward_passes - passes}

    def _once(self, name: str, measure: Callable[[], Any]) -> tuple[Any, float]:
        """Compute what all budgets share; returns it with its seconds, which count for each budget."""
        if name not in self.measured:
            begun = time.monotonic()
            found = measure()
            self.measured[name] = found, time.monotonic() - begun
        return self.measured[name]

    def training(self, row: Row) -> str:
        """Return the name of the training for ``row``; the budgets of the table are not part of it."""
        keeps = () if tuple(self.arguments.keep) == TABLE_KEEPS else (f"{keep:g}" for keep in self.arguments.keep)
        return "-".join((row.method, row.layout, str(row.seed), *keeps))

    def _trained(self, row: Row) -> tuple[Allocation, dict[str, Any]]:
        """Train as ``ara train-masks`` does, at all budgets in one run."""
        from ara.artifacts.factors import specs_of
        from ara.artifacts.ranks_file import from_table
        from ara.artifacts.training import TrainingResults, training_cost
        from ara.stages.train_masks import train_masks

        settings = self._settings(row)
        keeps = tuple(self.arguments.keep)
        config = TrainMasksConfig(keep=keeps, seed=row.seed, layout=row.layout, **settings["options"])
        view = train_masks(config, self.run, factors=row.factors, name=self.training(row))
        results = TrainingResults.read(view)
        if f"{row.keep:g}" not in results.budgets:
            raise NumericalError(f"not trained: {results.stopped}")
        result, log = results.budgets[f"{row.keep:g}"], results.log[f"{row.keep:g}"]
        if result.start is None:
            sys.exit(f"error: {view.key} was trained by an earlier version of ara\nhint: remove {view.path}")
        facts = {
            **training_cost(view, row.keep)._asdict(),
            **settings,
            "start": result.start,
            "won_on_held_out": result.won,
            "curve": [[entry.step, entry.held_out] for entry in log if entry.held_out is not None],
        }
        return from_table(result.ranks, specs_of(self.views[row.factors], row.layout)), facts


def check(bench: Bench, windows: int) -> None:
    """Check the dense row, and the row of ara at the largest budget of each layout, by independent computations."""
    from ara.artifacts.factors import specs_of
    from ara.artifacts.ranks_file import from_table
    from ara.artifacts.training import TrainingResults

    keep, seq_len = bench.arguments.keep[0], bench.arguments.seq_len
    dense = dict.fromkeys(spec.name for spec in specs_of(bench.views["whitened"]))
    check_dense(bench.run, bench.views["whitened"], bench.first_losses("dense", "whitened", dense, windows), seq_len)
    for layout in LAYOUT_NAMES:
        row = Row("two-sided", "ara", keep, 0, layout)
        trained = bench.run.open().view(f"train-masks/{bench.training(row)}")
        if "wikitext2_windows" in bench.rows.get(row.key, {}) and trained.manifest is not None:
            table = TrainingResults.read(trained).budgets[f"{keep:g}"].ranks
            ranks = from_table(table, specs_of(bench.views["two-sided"], layout))
            losses = bench.first_losses(row.key, "two-sided", ranks.ranks, windows)
            check_stored(bench.run, bench.views["two-sided"], ranks, layout, losses, seq_len)


def main() -> None:
    """Measure, print the tables, check the dense row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="model to compress")
    parser.add_argument("--keep", type=float, action="append", help="budget; may be repeated [default: 0.8 and 0.6]")
    parser.add_argument("--samples", type=int, default=256, help="calibration windows of 512 tokens")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per evaluation window")
    parser.add_argument("--windows", type=int, default=8, help="evaluate the first N windows of each text")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the learned methods")
    parser.add_argument("--steps", type=int, help="training steps of ARA's forms [default: theirs]")
    parser.add_argument("--only", default="*", help="rows to measure, such as 'two-sided/ara/*' [default: all]")
    parser.add_argument("--results", type=Path, help="file of finished rows [default: quality.json in the workspace]")
    parser.add_argument("--check-windows", type=int, default=4, help="windows of the independent computation")
    parser.add_argument("--workspace", type=Path, default=Path("bench-quality"), help="where to work")
    arguments = parser.parse_args()
    arguments.keep = sorted(arguments.keep or TABLE_KEEPS, reverse=True)
    if "ARA_DATA_DIR" not in os.environ:
        sys.exit("error: ARA_DATA_DIR is not set\nhint: point it at a folder with wikitext2_raw/ and c4_sample/")
    console = Console()
    bench = Bench(arguments, console)
    bench.dense()
    for row in wanted(arguments.keep, arguments.seeds):
        if fnmatchcase(row.key, arguments.only) or row == Row("whitened", "uniform", row.keep, 0):
            bench.measure(row)
    show(console, bench.rows)
    check(bench, arguments.check_windows)


if __name__ == "__main__":
    main()
