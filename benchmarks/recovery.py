"""What ``ara recover`` gives back: every level, learned and uniform ranks, several budgets, the same texts.

    ARA_DATA_DIR=... make bench-recovery                                            # in ./bench-recovery
    python benchmarks/recovery.py --keep 0.6 --only 'mixed/ara/*' --windows 8       # a part of it
    python benchmarks/recovery.py --results benchmarks/results/recovery.json        # add to the published rows

Factors, ranks and repairs read C4 with a fifth of conversations (``mixed``), or C4 alone. Judged are WikiText-2, C4
documents that no calibration has seen, Python's help topics, to which nothing is ever fitted, and held-out
conversations. Gap closed = (ln ppl_uniform − ln ppl) / (ln ppl_uniform − ln ppl_dense); uniform means whitened factors
at uniform ranks, in two factors, not repaired. All other models start from two-sided factors, and are pivoted except
for the rows ara-factors. Levels are cumulative. Every row is stored as soon as it is measured, and an interrupted run
continues; the results of all stages are in the workspace. ``benchmarks/recovery_table.py`` prints the tables.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ara.artifacts.checkpoint import CHECKPOINT, CheckpointResults
from ara.artifacts.evaluation import OpeningsPiece
from ara.config import AllocateConfig, DecomposeConfig, EvalConfig, RecoverConfig, TrainMasksConfig, TruncateConfig
from ara.data.conversations import load_conversations
from ara.data.texts import load_documents
from ara.data.tokens import calibration_windows
from ara.evaluation.chat import answer_distances
from ara.evaluation.divergence import summarise_divergence
from ara.evaluation.generation import greedy_batch, stop_tokens
from ara.evaluation.repetition import falls_into_repetition, repeated_share
from ara.models.checkpoint import load
from ara.models.placement import choose_placement, torch_dtype
from ara.stages.allocate import allocate
from ara.stages.chats import choose_chat, openings
from ara.stages.common import Run, model_of
from ara.stages.decompose import decompose
from ara.stages.recover import recover
from ara.stages.train_masks import train_masks
from ara.stages.truncate import truncate
from ara.workspace.view import StageView
from ara_cli.console import Console
from benchmarks.recovery_rows import CALIBRATIONS, Row, reference, wanted
from benchmarks.recovery_table import show
from benchmarks.row_file import RowFile
from benchmarks.text_losses import TextLosses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DENSE = "dense"
# Tokens of a calibration window.
SEQ_LEN = 512
# Prompts of the repetition measure: beginnings of held-out C4 documents, and tokens of their continuations.
PROMPT_TOKENS, NEW_TOKENS = 32, 128


class Judge:
    """The evaluation texts, and the dense model."""

    def __init__(self, arguments: argparse.Namespace, factors: StageView, run: Run) -> None:
        source = model_of(factors, run)
        self.arguments, self.console = arguments, run.report
        self.placement = choose_placement(dtype=arguments.dtype)
        self.tokenizer = source.load_tokenizer()
        self.dense: PreTrainedModel = source.load_model(torch_dtype(self.placement.dtype), self.placement.device)
        self.texts = TextLosses(self.tokenizer, arguments.windows, arguments.seq_len, run.report)
        config = EvalConfig(conversations=arguments.conversations, seq_len=arguments.seq_len)
        chats = load_conversations("chat", "evaluation")
        self.chat = choose_chat(chats, self.tokenizer, config, None, run.report)
        self.new_tokens = config.max_new_tokens
        # Windows of shuffled documents, so that each prompt is from another one.
        documents = load_documents("c4", "evaluation")
        size = {"samples": arguments.prompts, "seq_len": PROMPT_TOKENS, "seed": 0}
        self.prompts = calibration_windows(documents, self.tokenizer, **size).ids

    @cached_property
    def dense_answers(self) -> OpeningsPiece:
        """The dense model's answers, where conversations have none."""
        return openings(self.chat, DENSE, self.dense, self.tokenizer, self.new_tokens, self.console)

    def figures(self, name: str, model: PreTrainedModel) -> dict[str, Any]:
        """Return losses, distances on answers, empty answers and repetition of a model."""
        found = self.texts.of(model, name)
        own = openings(self.chat, name, model, self.tokenizer, self.new_tokens, self.console)
        found["empty"], found["conversations"] = sum(own.empty), len(own.empty)
        if model is not self.dense:
            models = {DENSE: self.dense, name: model}
            readings = self.chat.readings(self.dense_answers)
            distances = answer_distances(models, readings, DENSE, self.console, f"{name}: answers")[name]
            divergence = summarise_divergence(distances)
            found |= {"chat_kl": divergence.kl, "chat_stderr": divergence.kl_stderr, "agreement": divergence.agreement}
        stop = stop_tokens(self.dense)
        texts = [text for ids in self.prompts.split(16) for text in greedy_batch(model, ids, NEW_TOKENS, stop, name)]
        found["repeating"] = sum(map(falls_into_repetition, texts)) / len(texts)
        found["repeated"] = sum(map(repeated_share, texts)) / len(texts)
        return found


class Bench:
    """The stages and finished rows of one run."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self.arguments, self.console = arguments, console
        self.run = Run(arguments.workspace, "python benchmarks/recovery.py", console)
        names = (
            "windows",
            "seq_len",
            "conversations",
            "prompts",
            "samples",
            "held_out",
            "rank_samples",
            "rank_steps",
            "steps",
            "batch",
            "epochs",
        )
        settings = {name: getattr(arguments, name) for name in names}
        self.file = RowFile(arguments.results or arguments.workspace / "recovery.json", {"settings": settings})
        self.rows = self.file.rows

    @cached_property
    def judge(self) -> Judge:
        """The judge of all models."""
        return Judge(self.arguments, self.factors("mixed"), self.run)

    def factors(self, calibration: str, method: str = "two-sided") -> StageView:
        """Factor the model on a calibration text."""
        a = self.arguments
        text = CALIBRATIONS[calibration]
        sizes = {"samples": a.samples, "seq_len": SEQ_LEN}
        config = DecomposeConfig(model=a.model, method=method, text=text, dtype=a.dtype, **sizes)
        return decompose(config, self.run, name=f"{method}-{calibration}")

    def ranks(self, row: Row) -> StageView:
        """Choose the ranks of a row. All budgets share one training."""
        a, factors = self.arguments, self.factors(row.calibration)
        shared = {"samples": a.rank_samples, "held_out": a.held_out, "seed": row.seed}
        shared |= {"layout": row.layout, "dtype": a.dtype}
        name = f"{row.ranks}-{row.calibration}-{row.keep:g}-{row.seed}"
        masks = None
        if row.method == "ara":
            several = row.ranks == "ara" and row.seed == 0 and row.calibration == "mixed"
            keeps = tuple(a.keep) if several else (row.keep,)
            training = TrainMasksConfig(keep=keeps, steps=a.rank_steps, **shared)
            label = f"{row.ranks}-{row.calibration}-{row.seed}"
            masks = train_masks(training, self.run, factors=factors.name, name=label).name
        config = AllocateConfig(keep=row.keep, method=row.method, guard=False, **shared)
        return allocate(config, self.run, factors=factors.name, masks=masks, name=name)

    def model(self, row: Row) -> StageView:
        """Return the checkpoint of a row: truncated, then repaired level by level."""
        a, chosen = self.arguments, self.ranks(row)
        made = truncate(TruncateConfig(), self.run, allocation=chosen.name)
        for level in row.repairs:
            config = RecoverConfig(
                level=level,
                only=True,
                samples=max(a.samples, min(a.steps * a.batch, 2 * a.samples)) if level == "distill" else a.samples,
                held_out=a.held_out,
                seed=row.seed,
                dtype=a.dtype,
                steps=a.steps,
                batch=a.batch,
                block_epochs=a.epochs,
                text=CALIBRATIONS[row.calibration],
            )
            name = f"{chosen.name}-{row.level if level == row.repairs[-1] else level}"
            made = recover(config, self.run, checkpoint=made.key, name=name)
        return made

    def whitened(self, calibration: str, keep: float) -> StageView:
        """Return the checkpoint where the gap is fully open."""
        factors = self.factors(calibration, "whitened")
        config = AllocateConfig(keep=keep, method="uniform", dtype=self.arguments.dtype)
        chosen = allocate(config, self.run, factors=factors.name, name=f"whitened-{calibration}-{keep:g}")
        return truncate(TruncateConfig(), self.run, allocation=chosen.name)

    def measure(self, row: Row) -> None:
        """Measure a row, and the models that it is compared with."""
        if DENSE not in self.rows:
            self.file.keep(DENSE, self.judge.figures(DENSE, self.judge.dense))
        open_gap = reference(row.calibration, row.keep)
        if open_gap not in self.rows:
            self._judged(open_gap, self.whitened(row.calibration, row.keep))
        if row.key not in self.rows:
            self._judged(row.key, self.model(row))

    def _judged(self, key: str, view: StageView) -> None:
        self.console.step(f"Measuring {key}")
        placement = self.judge.placement
        model = load(view.path / CHECKPOINT, placement.device, placement.dtype)
        figures = self.judge.figures(key, model)
        recovery = CheckpointResults.read(view).recovery
        if recovery is not None:
            (level,) = recovery.levels
            figures |= {"level": level.plain(), "repair_kl": [recovery.before, recovery.after]}
        assert view.manifest is not None
        figures |= {"seconds": view.manifest.seconds, "peak_memory_bytes": view.manifest.peak_memory_bytes}
        self.file.keep(key, figures)


def main(words: Sequence[str] | None = None) -> None:
    """Measure the wanted rows, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="model to compress")
    parser.add_argument("--keep", type=float, action="append", help="budget; may be repeated [default: 0.8, 0.6, 0.4]")
    parser.add_argument("--seeds", type=int, default=3, help="seeds at keep 0.6")
    parser.add_argument("--only", action="append", help="pattern of rows, such as 'mixed/ara/*'; may be repeated")
    parser.add_argument("--windows", type=int, default=32, help="evaluation windows per text")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per evaluation window")
    parser.add_argument("--conversations", type=int, default=64, help="held-out conversations")
    parser.add_argument("--prompts", type=int, default=64, help="prompts that are continued by 128 tokens")
    parser.add_argument("--samples", type=int, default=256, help="calibration windows")
    parser.add_argument("--held-out", type=int, default=32, help="further windows that judge ranks and repairs")
    parser.add_argument("--rank-samples", type=int, default=128, help="further windows to learn ranks from")
    parser.add_argument("--rank-steps", type=int, default=12, help="training steps of ranks, per budget")
    parser.add_argument("--epochs", type=int, default=2, help="passes of block training")
    parser.add_argument("--steps", type=int, default=60, help="steps of distillation")
    parser.add_argument("--batch", type=int, default=16, help="windows per step of distillation")
    parser.add_argument("--dtype", default="auto", help="precision of all models")
    parser.add_argument("--workspace", type=Path, default=Path("bench-recovery"), help="where to work")
    parser.add_argument("--results", type=Path, help="file of the rows [default: recovery.json in the workspace]")
    arguments = parser.parse_args(words)
    if "ARA_DATA_DIR" not in os.environ:
        sys.exit(
            "error: ARA_DATA_DIR is not set\nhint: point it at a folder with c4_sample/, wikitext2_raw/, instructions/"
        )
    arguments.keep = sorted(set(arguments.keep or (0.8, 0.6, 0.4)), reverse=True)
    console = Console()
    bench = Bench(arguments, console)
    for row in wanted(arguments.keep, arguments.seeds):
        if arguments.only is None or any(fnmatchcase(row.key, pattern) for pattern in arguments.only):
            bench.measure(row)
    show(console, bench.rows)


if __name__ == "__main__":
    main()
