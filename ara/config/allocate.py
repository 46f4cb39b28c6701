"""Configs of the commands that choose ranks: ``ara allocate``, ``ara compare``, and the part of ``ara train-masks``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ara import bounds
from ara.config.base import Exclude, MaxWindows, Method, MethodValues, PlacementConfig, SeqLen, StageConfig
from ara.config.flags import Flag
from ara.config.latency import LatencyConfig
from ara.config.recover import NO_RECOVERY
from ara.config.sizes import DEFAULT_BLOCKS, SIZE_PATTERN, Block, EmbeddingBits, FewBitsConfig, bytes_in
from ara.layout_names import DEFAULT_LAYOUT, LayoutName

_KEEP = "fraction of the factorised layers' parameters to keep, in (0, 1]"


class TuningConfig(PlacementConfig):
    """Calibration windows for choosing ranks.

    The text is that of the decomposition. The windows differ from those that the factors were fitted to.
    """

    samples: int = Field(128, ge=1, le=bounds.MAX_WINDOWS, description="calibration windows for choosing ranks")
    held_out: int = Field(
        32, ge=1, le=bounds.MAX_WINDOWS, description="further calibration windows, for comparing candidate allocations"
    )
    batch_size: int = Field(4, ge=1, le=bounds.MAX_BATCH, description="windows per forward and backward pass")
    seed: int = Field(0, ge=0, lt=bounds.SEED_LIMIT, description="random seed")


class BudgetConfig(StageConfig):
    """The cost of a rank, and limits of the ranks beside the budget itself."""

    layout: LayoutName = Field(
        DEFAULT_LAYOUT,
        description="how an (m, n) layer of rank k is stored: factors (A and B, k(m+n) parameters) or pivoted "
        "(k rows of BA and coefficients for the others, k(m+n-k) parameters)",
    )
    rank_multiple: int = Field(
        1, ge=1, le=bounds.MAX_RANK, description="every rank is a multiple of this number (8 to 64 suit GPUs)"
    )
    min_rank: int = Field(1, ge=1, le=bounds.MAX_RANK, description="smallest rank of a layer")
    min_keep: float = Field(0.0, ge=0, le=1, description="smallest fraction of its parameters that a layer keeps")
    exclude: Exclude = Field(
        (), description="shell pattern of layers that stay dense but count in the budget, such as '*.down_proj'"
    )


class SizedConfig(TuningConfig, BudgetConfig, FewBitsConfig):
    """What a choice of ranks and bits needs beside the size itself."""

    blocks: Annotated[tuple[Block, ...], Flag(name="block", commas="length", example="32,64,128")] = Field(
        DEFAULT_BLOCKS,
        min_length=1,
        description="with a size: weights of a row that share a scale, lengths to choose from, separated by commas; "
        "the first one is that of the embedding and the head, and of layers that all have the same bits",
    )
    embedding_bits: EmbeddingBits = Field(
        16, description="with a size: bits per weight of the embedding and the head, 16: as they are"
    )


class TimedConfig(SizedConfig, LatencyConfig):
    """What a choice under any budget needs beside its limit: of parameters, of bytes or of time."""


class AllocateConfig(TimedConfig):
    """``ara allocate``: choose a rank, or dense, for every layer under one budget."""

    keep: Annotated[float | None, Flag(removable=True)] = Field(0.8, gt=0, le=1, description=_KEEP)
    size: Annotated[str | None, Flag(metavar="SIZE")] = Field(
        None,
        pattern=SIZE_PATTERN,
        description="size of the weight files after ara quantise, such as 90MB, instead of --keep: ranks and bits are "
        "chosen together",
    )
    bits_per_parameter: float | None = Field(
        None,
        gt=0,
        le=bounds.MAX_BITS,
        description="another way to give --size: bits per parameter of the dense model, embeddings and head included",
    )
    budget_bytes: int | None = Field(
        None, ge=1, le=bounds.MAX_SHARD_BYTES, description="another way to give --size: a whole number of bytes"
    )
    bits: Annotated[tuple[Literal[4, 8, 16], ...], Flag(commas="width", example="16,8,4")] = Field(
        (16, 8, 4),
        min_length=1,
        description="with a size: bits per weight to choose from, separated by commas; 16: as many as the model has "
        "(--exclude '*' leaves all layers dense, so that only their bits are chosen)",
    )
    method: Method = Field(
        "auto", description="allocator (see ara methods); auto: ara if trained masks exist, else sensitivity"
    )
    options: MethodValues = Field(default_factory=dict, description="option of the method; may be repeated")
    guard: bool = Field(
        True,
        description="use uniform ranks, or those that the method started from, if their loss on held-out text is lower",
    )
    ranks_sha256: Annotated[str | None, Flag(hidden=True)] = Field(
        None, description="checksum of the ranks file that was read instead of a method"
    )

    @property
    def asked_sizes(self) -> tuple[str, ...]:
        """The sizes as they were given on the command line, at most one of them allowed; none for ``--keep``."""
        given = {"size": self.size, "bits-per-parameter": self.bits_per_parameter, "budget-bytes": self.budget_bytes}
        return tuple(f"--{name} {value}" for name, value in given.items() if value is not None)

    def limit_bytes(self, parameters: int) -> int:
        """Return the size in bytes.

        Args:
            parameters: of the dense model, all of them.
        """
        if self.size is not None:
            return int(bytes_in(self.size))
        if self.bits_per_parameter is not None:
            return int(self.bits_per_parameter * parameters / 8)
        assert self.budget_bytes is not None, "no size"
        return self.budget_bytes


class CompareConfig(TimedConfig):
    """``ara compare``: every allocator at one budget, or every form of the model at some sizes, on the same factors."""

    size: Annotated[
        tuple[Annotated[str, Field(pattern=SIZE_PATTERN)], ...],
        Flag(metavar="SIZES", commas="size", example="90MB,60MB"),
    ] = Field(
        (),
        description="instead of --keep: compare ranks, fewer bits, and both together at these sizes of the weight "
        "files, separated by commas, by their loss on held-out calibration text",
    )
    recover: Annotated[str, Flag(metavar="LEVEL")] = Field(
        NO_RECOVERY,
        description="with sizes: also measure every form after a repair up to this level: closed, block, distill; or "
        "none",
    )
    keep: Annotated[float, Flag(removable=True)] = Field(0.8, gt=0, le=1, description=_KEEP)
    methods: Annotated[tuple[str, ...], Flag(metavar="NAMES", commas="allocator", example="uniform,ara")] = Field(
        (), description="allocators to compare, separated by commas [default: all]"
    )
    tasks: Annotated[tuple[str, ...], Flag(metavar="TASKS", commas="task", example="wikitext2")] = Field(
        ("wikitext2", "c4"),
        min_length=1,
        description="texts for perplexity, separated by commas: wikitext2, c4, python-docs, file:PATH[#FIELD]",
    )
    eval_seq_len: SeqLen = None
    max_windows: MaxWindows = None
    eval_batch_size: int = Field(1, ge=1, le=bounds.MAX_BATCH, description="evaluation windows per forward pass")
