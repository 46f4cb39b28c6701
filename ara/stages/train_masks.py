"""``ara train-masks``: learn the loss of every rank of every layer; an interrupted run resumes from its checkpoint."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ara.artifacts.ranks_file import from_table, ranks_table
from ara.artifacts.training import (
    EVENTS_FOLDER,
    LEARNED,
    LOG_FILE,
    TABLE_FILE,
    LoggedStep,
    TrainedBudget,
    TrainingResults,
    masks_file,
    stopped_early,
)
from ara.config import MaskTrainingOptions, TrainMasksConfig
from ara.errors import NumericalError
from ara.events import event_writer_class, write_events
from ara.masks.ara_family import AraFamily, ara_family, check_layout, needs_table
from ara.masks.context import TuningContext
from ara.masks.loop import train
from ara.masks.rank_losses import LearnedLosses
from ara.masks.sensitivity_table import sensitivity_table
from ara.masks.state import TrainingSettings, TrainingState
from ara.solver.problem import Allocation, Module
from ara.stages.allocate import budget_of
from ara.stages.common import Run, already_done, begin, default_name, open_task
from ara.stages.modules import load_modules
from ara.stages.stored_ranks import stored_ranks
from ara.stages.trainings import covering_training
from ara.stages.tuning import open_tuning_context, placed
from ara.workspace.store import Workspace
from ara.workspace.view import StageView
from ara.workspace.writer import StageWriter


def train_masks(
    config: TrainMasksConfig,
    run: Run,
    *,
    factors: str | None = None,
    name: str | None = None,
    keep_on_interrupt: bool = False,
) -> StageView:
    """Train masks at every budget of ``config.keep``, largest first, and store the learned losses and ranks.

    Args:
        config: budgets, objective, steps.
        run: workspace and reporter.
        factors: name of the decomposition; the latest by default.
        name: of the result. By default it consists of decomposition (unless the default one), objective and budgets,
            and a finished training with the same settings that covers these budgets is reused.
        keep_on_interrupt: on Ctrl+C store the best allocations so far as the result, unless that would replace a
            complete one, and train no further budget. Otherwise Ctrl+C raises ``KeyboardInterrupt``. In both cases the
            next call resumes from the last checkpoint.

    Raises:
        AraError: no decomposition, a budget that cannot be met, a loss that is NaN or diverges.
    """
    started = begin(name, factors)
    with open_task("train-masks", run, started) as task:
        decomposition = task.workspace.require("factors", factors)
        run.report.step(f"Training masks at keep {', '.join(f'{keep:g}' for keep in config.keep)}")
        check_layout(_options(config), config.layout)
        if config.tensorboard:
            event_writer_class()
        modules = load_modules(decomposition, config.layout)
        specs = [module.spec for module in modules]
        stored = stored_ranks(decomposition)
        if config.objective == "paper":
            stored.need_all("--objective paper", "use --objective priced")
        stored.check_keep(specs, max(config.keep), run.report)
        for keep in config.keep:
            budget_of(config, specs, keep)
        resolved = placed(config, run)
        if name is None:
            covering = None if run.force else covering_training(task.workspace, decomposition, resolved)
            if covering is not None:
                return already_done(covering, run)
            name = default_name(decomposition.name, config.objective, keep=config.keep, layout=config.layout)
        task.describe(name, resolved, (decomposition,))
        done = task.finished()
        if done is not None and not run.force and not task.unfinished():
            if stopped := stopped_early(done):
                run.report.warn(f"{done.key} is not complete: {stopped}; to train again: --force")
            return already_done(done, run)
        earlier = task.view()
        if run.group.size > 1 or (earlier.state == "done" and not stopped_early(earlier)):
            keep_on_interrupt = False
        training = partial(_Training, resolved, modules, decomposition, task.workspace, run, keep_on_interrupt)
        if run.group.writes:
            with task.writer(seed=config.seed, resumable=True) as stage:
                training(stage).all_budgets()
        else:
            training(None).all_budgets()
        return task.view()


def _options(config: TrainMasksConfig) -> MaskTrainingOptions:
    return MaskTrainingOptions(**{key: getattr(config, key) for key in MaskTrainingOptions.model_fields})


class _Training:
    """One run of the stage; of several processes, those without a writer do the same work and store nothing."""

    def __init__(
        self,
        config: TrainMasksConfig,
        modules: list[Module],
        decomposition: StageView,
        workspace: Workspace,
        run: Run,
        keep_on_interrupt: bool,
        stage: StageWriter | None,
    ) -> None:
        self.config, self.modules, self.stage, self.run = config, modules, stage, run
        self.keep_on_interrupt = keep_on_interrupt
        begun = None if stage is None else (stage.folder, stage.checkpoint(), stage.finished, stage.results)
        self.folder: Path
        checkpoint: tuple[dict[str, torch.Tensor], dict[str, Any]] | None
        self.folder, checkpoint, finished, stored = run.group.broadcast(begun)
        self.checkpoint, self.finished = checkpoint, set(finished)
        self.specs = [module.spec for module in modules]
        self.context: TuningContext = open_tuning_context(decomposition, self.specs, config, workspace, run)
        self.options = _options(config)
        results = TrainingResults.parse(stored)
        again = run.force and results.stopped
        if again:
            self.checkpoint = None
        # Budgets stored after Ctrl+C have fewer steps: their training is completed.
        short = [keep for keep, row in results.budgets.items() if again or row.steps < config.steps]
        self.finished -= {masks_file(float(keep)) for keep in short}
        budgets = {keep: row for keep, row in results.budgets.items() if keep not in short}
        log = {keep: rows for keep, rows in results.log.items() if keep not in short}
        self._write_results(replace(results, budgets=budgets, log=log, stopped=None))

    def _write_results(self, results: TrainingResults) -> None:
        self.results = results
        if self.stage is not None:
            results.write(self.stage)

    def _store(self, file: str, tensors: Mapping[str, torch.Tensor], results: TrainingResults) -> None:
        """Store a file; the results name it only after it is written, in case of an interruption."""
        if self.stage is not None:
            self.stage.tensors(file, tensors, results.plain())
        self.results = results

    def all_budgets(self) -> None:
        """Train at each budget, largest first; each may start from the losses learned at the previous one.

        The paper's form learns ranks instead of losses, so all its budgets have the same start.

        Raises:
            NumericalError: NaN or divergence at the first budget; at a later one, the earlier results are kept.
            KeyboardInterrupt: Ctrl+C, without ``keep_on_interrupt`` or without any result.
        """
        table = self._table()
        learned: LearnedLosses | None = None
        for keep in self.config.keep:
            if masks_file(keep) in self.finished:
                tables = load_file(self.folder / masks_file(keep)) if self.config.objective == "priced" else None
                learned = LearnedLosses(keep, tables, from_table(self.results.budgets[f"{keep:g}"].ranks, self.specs))
            else:
                try:
                    learned = self._one_budget(keep, table, learned)
                except NumericalError as error:
                    if not self.results.budgets:
                        raise
                    self._write_results(replace(self.results, stopped=f"at keep {keep:g} {error}"))
                    self.run.report.warn(f"no result at keep {keep:g}: {error} ({error.hint}); to train again: --force")
                    break
                except KeyboardInterrupt:
                    if not self.keep_on_interrupt or not self.results.budgets:
                        raise
                    stopped = self.results.stopped or f"interrupted at keep {keep:g}"
                    self._write_results(replace(self.results, stopped=stopped))
            if f"{keep:g}" in self.results.log:
                self._write_log(keep, None)
            if self.results.stopped:
                if self.stage is not None:
                    self.stage.to_go_on = True
                same = "the same command" + (" without --force" if self.run.force else "")
                self.run.report.warn(f"{self.results.stopped}: the best so far is stored; {same} resumes the training")
                break

    def _table(self) -> dict[str, torch.Tensor] | None:
        """Return the sensitivity table, from its file if an interrupted run has stored it."""
        if not needs_table(self.options):
            return None
        if TABLE_FILE in self.finished:
            return load_file(self.folder / TABLE_FILE)
        table = sensitivity_table(self.context)
        results = replace(self.results, table_seconds=table.seconds, table_windows=len(self.context.train))
        self._store(TABLE_FILE, table.values, results)
        return table.values

    def _one_budget(
        self, keep: float, table: dict[str, torch.Tensor] | None, learned: LearnedLosses | None
    ) -> LearnedLosses:
        """Train at one budget, store the result and return it."""
        config, report = self.config, self.run.report
        budget = budget_of(config, self.specs, keep)
        families: dict[str, AraFamily] = {config.start: ara_family(self.options, self.modules, budget, table)}
        if learned is not None and learned.tables is not None:
            families[LEARNED] = ara_family(self.options, self.modules, budget, table, learned)
        resumed = self._resumed(keep)
        # Checkpoints of older versions have no start: they used the learned one if there was any.
        start = list(families)[-1] if resumed is None else resumed[1] or list(families)[-1]
        if resumed is not None and start in families:
            state = resumed[0]
            report.fact(f"resuming after step {state.step} of {config.steps} at keep {keep:g}")
        else:
            begun = time.monotonic()
            start = self._best_start(families)
            state = TrainingState(seconds=time.monotonic() - begun)
        family = families[start]

        def save(state: TrainingState) -> None:
            due = state.step % config.save_every == 0 and state.step < config.steps
            if due and self.stage is not None:
                self.stage.save_checkpoint(state.all_tensors(), {"keep": keep, "start": start, "state": state.plain()})
                self._write_log(keep, state)

        state = train(
            family,
            self.context.model,
            self.context.train,
            self.context.held_out,
            TrainingSettings.of(self.options, config.batch_size, config.seed),
            state=state,
            save=save,
            keep_on_interrupt=self.keep_on_interrupt,
            report=report,
            label=f"Training at keep {keep:g}",
        )
        tables = family.tables(state.best_tensors)
        ranks = Allocation.of_ranks(self.specs, state.best, budget)
        before = state.log[0].held_out
        assert before is not None
        report.fact(
            f"keep {keep:g}: best after step {state.best_step}, held-out loss {state.best_held_out:.4f} nats/token, "
            f"{before - state.best_held_out:.4f} below the start"
        )
        stopped = self.results.stopped
        if state.interrupted:
            stopped = f"interrupted after step {state.step} of {config.steps} at keep {keep:g}"
            self._write_results(replace(self.results, stopped=stopped))
        result = TrainedBudget(
            ranks=ranks_table(ranks),
            start=start,
            start_held_out=before,
            held_out=state.best_held_out,
            best_step=state.best_step,
            steps=state.step,
            seconds=state.seconds,
            backward_passes=state.backward_passes,
        )
        budgets = {**self.results.budgets, f"{keep:g}": result}
        results = replace(self.results, budgets=budgets, log={**self.results.log, f"{keep:g}": _logged(state)})
        self._store(masks_file(keep), tables or state.best_tensors, results)
        return LearnedLosses(keep, tables, ranks)

    def _resumed(self, keep: float) -> tuple[TrainingState, str | None] | None:
        """Return state and start of an interrupted run at this budget, or ``None``."""
        tensors, values = self.checkpoint or ({}, {})
        if values.get("keep") != keep:
            return None
        try:
            start = values.get("start")
            return TrainingState.from_plain(values.get("state", {}), tensors), None if start is None else str(start)
        except ValueError:
            self.run.report.warn(f"the checkpoint at keep {keep:g} is not valid: the training starts again")
            return None

    def _best_start(self, families: Mapping[str, AraFamily]) -> str:
        """Return the name of the family whose first allocation is best on held-out text; NaN is never the best."""
        if len(families) == 1:
            return next(iter(families))
        model, losses = self.context.model, {}
        try:
            for name, family in families.items():
                model.use(family.allocation().ranks)
                losses[name] = float(model.nll(self.context.held_out, self.context.batch_size).mean())
        finally:
            model.use_dense()
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self.run.report.fact(f"held-out loss of the possible starts, nats/token: {shown}")
        return min(losses, key=lambda name: losses[name] if losses[name] == losses[name] else math.inf)

    def _write_log(self, keep: float, state: TrainingState | None) -> None:
        """Write the whole log of all budgets so far: after a resumed run it has no gap and no repeated row."""
        if self.stage is None:
            return
        logs = dict(self.results.log)
        if state is not None:
            logs[f"{keep:g}"] = _logged(state)
        text = io.StringIO()
        columns = [column.name for column in fields(LoggedStep)]
        writer = csv.DictWriter(text, ["budget", *columns], lineterminator="\n")
        writer.writeheader()
        for name, rows in logs.items():
            writer.writerows({"budget": name, **row.plain()} for row in rows)
        (self.stage.folder / LOG_FILE).write_text(text.getvalue(), encoding="utf-8")
        # Logs contain times, so they are excluded from the content hash.
        self.stage.loose(LOG_FILE)
        if self.config.tensorboard:
            scalars = [
                (row.step, {"loss": row.loss, "keep": row.keep, "dense": row.dense, "held_out": row.held_out})
                for row in logs[f"{keep:g}"]
            ]
            for path in write_events(self.stage.folder / EVENTS_FOLDER / f"keep-{keep:g}", scalars):
                self.stage.loose(path.relative_to(self.stage.folder).as_posix())


def _logged(state: TrainingState) -> tuple[LoggedStep, ...]:
    return tuple(LoggedStep(**asdict(row)) for row in state.log)
