"""The best model for a size in bytes: dense in fewer bits, ranks, or both chosen together.

    ARA_DATA_DIR=... make bench-bytes                                            # in ./bench-bytes
    python benchmarks/bytes.py --size 33 --only 'twin/*' --windows 2             # a part of it
    python benchmarks/bytes.py --recovered                                       # also repaired before rounding
    python benchmarks/bytes.py --distilled --only '*/distilled'                  # also repaired after rounding

Sizes are those of the linear layers, in per cent of bfloat16; embeddings, head and norms are the same in all files. At
each size stand the dense model in 16, 8 and 4 bits (rounded to nearest, and calibrated) where it fits, the dense model
with 8 or 4 bits per layer, ranks in bfloat16, ranks in 8 bits, and ranks and bits chosen together. Every model is a
checkpoint of ARA's own stages, without the guard, and is read back for its losses on WikiText-2, held-out C4 and
Python's help topics.

The demo model was stored in 4 bits, so rounding it to 4 bits again is no result. All sizes are measured on its rotated
twin (``benchmarks/off_grid.py``). Every row is stored as soon as it is measured, and an interrupted run continues; the
results of all stages are in the workspace. ``benchmarks/bytes_table.py`` prints the tables.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from ara import bounds
from ara.allocation.forms import FORMS
from ara.artifacts.checkpoint import CHECKPOINT, CheckpointResults
from ara.artifacts.factors import specs_of
from ara.artifacts.ranks import read_allocation
from ara.config import AllocateConfig, DecomposeConfig, QuantiseConfig, RecoverConfig, TruncateConfig
from ara.config.sizes import DEFAULT_BLOCKS, few_bits
from ara.errors import NumericalError, UsageError
from ara.layout_names import LAYOUT_NAMES
from ara.layouts.grid import Grid
from ara.models.checkpoint import load
from ara.models.placement import choose_placement
from ara.stages.allocate import allocate
from ara.stages.allocate_bytes import other_bytes
from ara.stages.common import Run, model_of
from ara.stages.decompose import decompose
from ara.stages.quantise import quantise
from ara.stages.recover import recover
from ara.stages.truncate import truncate
from ara.workspace.view import StageView
from ara_cli.console import Console
from benchmarks.bytes_rows import DISTILLED, ORIGINAL, RECOVERED, SIZES, TWIN, Row, level_at, wanted
from benchmarks.bytes_table import show
from benchmarks.off_grid import write_twin
from benchmarks.row_file import RowFile
from benchmarks.text_losses import TextLosses

# Precision of the files that are not rounded; a processor without it computes in another one.
STORED = "bfloat16"
# Tokens of a calibration window.
SEQ_LEN = 512
# The repair after rounding.
REPAIR: dict[str, Any] = {"level": "distill", "only": True}
# Settings that determine a row.
SETTINGS = ("model", "windows", "seq_len", "samples", "rank_samples", "held_out", "layout", "blocks", "dtype", "seed")


class Compressor:
    """Makes the checkpoints of one model, in a workspace of its own."""

    def __init__(self, model: str, arguments: argparse.Namespace, run: Run) -> None:
        self.model, self.arguments, self.run = model, arguments, run
        # As of quantise and allocate.
        self.tuning = {"samples": arguments.rank_samples, "held_out": arguments.held_out, "seed": arguments.seed}
        self.tuning |= {"dtype": arguments.dtype}

    @cached_property
    def factors(self) -> StageView:
        """The factors; the dense model comes from here as well."""
        a = self.arguments
        sizes = {"samples": a.samples, "seq_len": SEQ_LEN, "seed": a.seed}
        return decompose(
            DecomposeConfig(model=self.model, text=a.text, dtype=a.dtype, factors_dtype=STORED, **sizes), self.run
        )

    def limit(self, size: int) -> int:
        """Return the bytes of a file whose linear layers have ``size`` per cent of their bytes in bfloat16."""
        return other_bytes(self.factors) + size * self.linear_bytes // 100

    @cached_property
    def linear_bytes(self) -> int:
        """Bytes of the dense linear layers in bfloat16."""
        return sum(spec.stored_bytes(None) for spec in specs_of(self.factors))

    def ranks(self, row: Row) -> StageView:
        """Choose ranks and bits of a row.

        Raises:
            UsageError: nothing fits the size.
        """
        form, layout = FORMS[row.form], self.arguments.layout
        config = AllocateConfig(keep=1.0, method="uniform", layout=layout)
        if row.size is not None:
            exclude = () if form.ranks else ("*",)
            shared = {
                **self.tuning,
                "layout": layout,
                "exclude": exclude,
                "guard": False,
                "blocks": self.arguments.blocks,
            }
            config = AllocateConfig(budget_bytes=self.limit(row.size), bits=form.bits, **shared)
        return allocate(config, self.run, factors=self.factors.name, name=row.allocation)

    def checkpoint(self, row: Row, chosen: StageView) -> StageView:
        """Return the checkpoint of a row: truncated, repaired if wanted, rounded unless it has 16 bits, repaired."""
        form, a = FORMS[row.form], self.arguments
        settings = {"samples": a.samples, "held_out": a.held_out, "seed": a.seed, "dtype": a.dtype}
        made = truncate(TruncateConfig(), self.run, allocation=chosen.name)
        before = level_at(row.form, RECOVERED if row.level == DISTILLED else row.level)
        if before == RECOVERED:
            made = recover(RecoverConfig(**settings), self.run, checkpoint=made.key, name=f"{chosen.name}-{RECOVERED}")
        if not self.grids(row, chosen):
            return made
        # A large loss is a result as well.
        config = QuantiseConfig(
            bits=None if form.sized else form.bits[0],
            method=form.method,
            tolerance=bounds.MAX_WEIGHT,
            block=self.arguments.blocks[0],
            **self.tuning,
        )
        rounded = quantise(config, self.run, checkpoint=made.key, name=row.rounded(before))
        if row.level != DISTILLED:
            return rounded
        repair = RecoverConfig(**settings, **REPAIR)
        return recover(repair, self.run, checkpoint=rounded.key, name=f"{rounded.name}-{DISTILLED}")

    def grids(self, row: Row, chosen: StageView) -> dict[str, Grid]:
        """Return the grid of every layer that is rounded."""
        specs, block = specs_of(self.factors, self.arguments.layout), self.arguments.blocks[0]
        if row.size is not None:
            return read_allocation(chosen, specs).grids(block, True)
        bits = few_bits(FORMS[row.form].bits[0])
        return {} if bits is None else {spec.name: Grid(bits, block, True) for spec in specs}

    def sizes(self, row: Row, chosen: StageView, made: StageView) -> dict[str, Any]:
        """Return the bytes of a row, its layers by bits, and the seconds of allocation and of the last stage."""
        specs = specs_of(self.factors, self.arguments.layout)
        grids, ranks = self.grids(row, chosen), read_allocation(chosen, specs).ranks
        linear = sum(spec.stored_bytes(ranks[spec.name], grids.get(spec.name)) for spec in specs)
        own = [grids[spec.name] for spec in specs if spec.name in grids]
        widths = Counter(grid.bits for grid in own) + Counter({16: len(specs) - len(own)})
        results = CheckpointResults.read(made)
        assert made.manifest is not None and chosen.manifest is not None
        return {
            "linear_share": linear / self.linear_bytes,
            "file_bytes": results.disk_bytes,
            "low_rank_layers": results.low_rank_layers,
            "layers": {str(width): count for width, count in sorted(widths.items())},
            "blocks": {str(block): count for block, count in sorted(Counter(grid.block for grid in own).items())},
            "seconds": made.manifest.seconds + chosen.manifest.seconds,
        }


class Bench:
    """The models, texts and finished rows of one run."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self.arguments, self.console = arguments, console
        settings = {name: getattr(arguments, name) for name in (*SETTINGS, "text")}
        self.file = RowFile(arguments.results or arguments.workspace / "bytes.json", {"settings": settings})

    @cached_property
    def compressors(self) -> dict[str, Compressor]:
        """The original model and its twin, which is written here."""
        a = self.arguments
        folder = a.workspace / "twin-model"
        if not folder.exists():
            a.workspace.mkdir(parents=True, exist_ok=True)
            write_twin(a.model, folder, a.seed, self.console)
        models = {TWIN: str(folder), ORIGINAL: a.model}
        command = "python benchmarks/bytes.py"
        return {
            name: Compressor(model, a, Run(a.workspace / name, command, self.console)) for name, model in models.items()
        }

    @cached_property
    def texts(self) -> TextLosses:
        """The evaluation texts; both models have one tokenizer."""
        twin = self.compressors[TWIN]
        tokenizer = model_of(twin.factors, twin.run).load_tokenizer()
        return TextLosses(tokenizer, self.arguments.windows, self.arguments.seq_len, self.console)

    def measure(self, row: Row) -> None:
        """Make and measure one row, unless it is there already; a size that is too small is a result."""
        if row.key in self.file.rows:
            return
        self.console.step(f"Measuring {row.key}")
        compressor = self.compressors[row.model]
        limit = None if row.size is None else compressor.limit(row.size)
        try:
            figures = self._figures(row, compressor)
        except (NumericalError, UsageError) as error:
            self.console.warn(f"{row.key}: {error}")
            figures = {"error": str(error)}
        self.file.keep(row.key, {"limit_bytes": limit, **figures})

    def _figures(self, row: Row, compressor: Compressor) -> dict[str, Any]:
        chosen = compressor.ranks(row)
        made = compressor.checkpoint(row, chosen)
        placement = choose_placement(dtype=self.arguments.dtype)
        model = load(made.path / CHECKPOINT, placement.device, placement.dtype)
        losses = self.texts.of(model, row.key)
        if not all(map(math.isfinite, losses["texts"].values())):
            raise NumericalError("a loss is NaN or infinite")
        return {**compressor.sizes(row, chosen, made), **losses}


def main(words: Sequence[str] | None = None) -> None:
    """Measure the wanted rows, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a Llama model")
    parser.add_argument(
        "--size",
        type=int,
        action="append",
        help=f"per cent of the linear layers in bfloat16; may be repeated [default: {', '.join(map(str, SIZES))}]",
    )
    parser.add_argument("--recovered", action="store_true", help="also repair models with ranks, at the level closed")
    parser.add_argument("--distilled", action="store_true", help="also repair rounded models, at the level distill")
    parser.add_argument("--only", action="append", help="pattern of rows, such as 'twin/joint/*'; may be repeated")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows per text")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per evaluation window")
    parser.add_argument("--text", default="c4", help="calibration text of factors, ranks, rounding and repair")
    parser.add_argument("--samples", type=int, default=256, help="calibration windows of factors and repair")
    parser.add_argument("--rank-samples", type=int, default=128, help="further windows for ranks, and for rounding")
    parser.add_argument("--held-out", type=int, default=32, help="further windows that judge rounding and repair")
    parser.add_argument("--layout", default="factors", choices=LAYOUT_NAMES, help="of low-rank layers")
    parser.add_argument(
        "--block",
        dest="blocks",
        type=int,
        action="append",
        help="weights that share a scale and a zero point; may be repeated: models for a size choose between them, and "
        f"the others have the first one [default: {', '.join(map(str, DEFAULT_BLOCKS))}]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the rotation, and of all random choices")
    parser.add_argument("--dtype", default="auto", help=f"precision to compute in; files are in {STORED}")
    parser.add_argument("--workspace", type=Path, default=Path("bench-bytes"), help="where to work")
    parser.add_argument("--results", type=Path, help="file of the rows [default: bytes.json in the workspace]")
    arguments = parser.parse_args(words)
    arguments.blocks = arguments.blocks or list(DEFAULT_BLOCKS)
    if "ARA_DATA_DIR" not in os.environ:
        sys.exit("error: ARA_DATA_DIR is not set\nhint: point it at a folder with c4_sample/ and wikitext2_raw/")
    console = Console()
    bench = Bench(arguments, console)
    sizes = sorted(set(arguments.size or SIZES), reverse=True)
    for row in wanted(sizes, arguments.recovered, arguments.distilled):
        if arguments.only is None or any(fnmatchcase(row.key, pattern) for pattern in arguments.only):
            bench.measure(row)
    show(console, bench.file.rows)


if __name__ == "__main__":
    main()
