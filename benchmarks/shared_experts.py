"""One factor A for the experts of a block (``--share-experts``) against a factor for each, at equal parameters.

    ARA_DATA_DIR=... make bench-shared-experts               # trains a small mixture first
    python benchmarks/shared_experts.py --steps 100 --keep 0.8 --workspace somewhere

No mixture of experts is small enough to be measured everywhere, and random weights have no structure that experts could
share. So a small one is trained here from random weights: Qwen3-MoE, 4 blocks of 16 experts, of which a token gets 4,
on C4, with a tokenizer of its own. It is no good language model. Both forms are decomposed two-sided on the same
windows and cut at the ranks of the sensitivity table; ``closed`` repairs them. Judged are WikiText-2, C4 documents that
neither training nor calibration has seen, and Python's help topics. Rows are stored as soon as they are measured, and
an interrupted run continues.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ara.artifacts.checkpoint import CHECKPOINT, CheckpointResults
from ara.artifacts.ranks import RanksResults
from ara.config import AllocateConfig, DecomposeConfig, RecoverConfig, TruncateConfig
from ara.data.texts import load_documents
from ara.models.checkpoint import load
from ara.models.sources import resolve
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.recover import recover
from ara.stages.truncate import truncate
from ara.workspace.view import StageView
from ara_cli.console import Console, columns
from benchmarks.row_file import RowFile
from benchmarks.text_losses import TEXTS, TextLosses

END = "<|endoftext|>"
# Few tokens: the model learns more of them from little text, and needs its blocks for spelling.
VOCABULARY = 512
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# Of the training: windows per step, tokens per window, the largest learning rate, steps in which it rises.
BATCH, SEQ_LEN, RATE, WARM_UP = 16, 256, 2e-3, 40
FORMS = {"own": False, "shared": True}
LEVELS = ("frozen", "closed")
# Not judged: the settings of the stages on this processor.
CPU: dict[str, Any] = {"device": "cpu", "dtype": "float32"}


def mixture(folder: Path, steps: int, console: Console) -> Path:
    """Train the mixture, or return the folder of a finished one."""
    if (folder / "config.json").is_file():
        return folder
    documents = load_documents("c4", "calibration").documents
    console.step(f"Training a mixture of experts on {len(documents):,} documents of C4")
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(documents, VOCABULARY, special_tokens=[END], show_progress=False)
    ends = {"bos_token": END, "eos_token": END, "pad_token": END}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, **ends)
    encoded = tokenizer(list(documents), add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([token for document in encoded for token in (*document, 0)])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **CONFIG)).train()
    console.fact(
        f"{sum(one.numel() for one in model.parameters()):,} parameters, {len(tokens):,} tokens, {steps} steps"
    )
    optimiser = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    with console.bar("Training", steps) as bar:
        for _ in range(steps):
            starts = torch.randint(len(tokens) - SEQ_LEN, (BATCH,)).tolist()
            ids = torch.stack([tokens[start : start + SEQ_LEN] for start in starts])
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            bar.advance()
    model.config.output_router_logits = False
    model.save_pretrained(folder.with_name("unfinished"))
    tokenizer.save_pretrained(folder.with_name("unfinished"))
    folder.with_name("unfinished").rename(folder)
    return folder


class Bench:
    """The stages and finished rows of one run."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self.arguments, self.console = arguments, console
        names = ("steps", "samples", "held_out", "windows", "seq_len")
        settings = {name: getattr(arguments, name) for name in names}
        self.file = RowFile(arguments.results or arguments.workspace / "shared-experts.json", {"settings": settings})
        self.model = mixture(arguments.workspace / "model", arguments.steps, console)
        self.source = resolve(str(self.model), report=console)
        self.texts = TextLosses(self.source.load_tokenizer(), arguments.windows, arguments.seq_len, console)

    def measure(self, keep: float, form: str) -> None:
        """Measure the dense model, and one form at one budget, frozen and repaired."""
        if "dense" not in self.file.rows:
            self.file.keep("dense", self.texts.of(self.source.load_model(torch.float32), "dense"))
        keys = {level: f"{form}/{keep:g}/{level}" for level in LEVELS}
        if keys["closed"] in self.file.rows:
            return
        a = self.arguments
        run = Run(a.workspace / form, "python benchmarks/shared_experts.py", self.console)
        sizes = {"samples": a.samples, "seq_len": a.seq_len}
        text = {"model": str(self.model), "text": "c4", "share_experts": FORMS[form]}
        factors = decompose(DecomposeConfig(**text, **sizes, **CPU), run)
        rank_windows = {"samples": a.samples // 2, "held_out": a.held_out}
        config = AllocateConfig(keep=keep, method="sensitivity", guard=False, **rank_windows, **CPU)
        ranks = allocate(config, run, factors=factors.name, name=f"{keep:g}")
        made = truncate(TruncateConfig(), run, allocation=ranks.name)
        kept = RanksResults.read(ranks).linear_keep
        self._judge(keys["frozen"], made, kept)
        repair = RecoverConfig(level="closed", text="c4", held_out=a.held_out, **sizes, **CPU)
        self._judge(keys["closed"], recover(repair, run, checkpoint=made.key), kept)

    def _judge(self, key: str, view: StageView, kept: float) -> None:
        if key not in self.file.rows:
            figures = self.texts.of(load(view.path / CHECKPOINT, "cpu"), key)
            parameters = CheckpointResults.read(view).parameters
            self.file.keep(key, {**figures, "linear_keep": kept, "parameters": parameters})


def lines(rows: dict[str, Any], keeps: Sequence[float]) -> Iterator[tuple[str, ...]]:
    """Yield the table: perplexities by form, budget and level."""
    for key in ("dense", *(f"{form}/{keep:g}/{level}" for keep in keeps for level in LEVELS for form in FORMS)):
        if key in rows:
            row = rows[key]
            kept = f"{100 * row['linear_keep']:.1f} %" if "linear_keep" in row else "–"
            yield key, kept, *(f"{math.exp(row['texts'][text]):.2f}" for text in TEXTS)


def main(words: Sequence[str] | None = None) -> None:
    """Measure both forms at every budget, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, action="append", help="budget; may be repeated [default: 0.8, 0.6, 0.4]")
    parser.add_argument("--steps", type=int, default=500, help=f"training steps of {BATCH} × {SEQ_LEN} tokens")
    parser.add_argument("--samples", type=int, default=256, help="calibration windows")
    parser.add_argument("--held-out", type=int, default=32, help="further windows that judge repairs")
    parser.add_argument("--windows", type=int, default=64, help="evaluation windows per text")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per window")
    parser.add_argument("--workspace", type=Path, default=Path("bench-shared-experts"), help="where to work")
    parser.add_argument("--results", type=Path, help="file of the rows [default: in the workspace]")
    arguments = parser.parse_args(words)
    if "ARA_DATA_DIR" not in os.environ:
        sys.exit("error: ARA_DATA_DIR is not set\nhint: point it at a folder with c4_sample/ and wikitext2_raw/")
    keeps = arguments.keep or [0.8, 0.6, 0.4]
    console = Console()
    bench = Bench(arguments, console)
    for keep in keeps:
        for form in FORMS:
            bench.measure(keep, form)
    console.table("Perplexities", columns("model", "linear kept", *TEXTS), list(lines(bench.file.rows, keeps)))


if __name__ == "__main__":
    main()
