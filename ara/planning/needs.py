"""What every stage needs: work, memory, disk. The code of a stage decides; each function names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ara.calibration.chunks import split_into_chunks
from ara.calibration.gradients import gradient_bytes
from ara.calibration.moments import InputAccumulator, gram_flops
from ara.config import DecomposeConfig, EvalConfig, RecoverConfig, TrainMasksConfig, TruncateConfig, TuningConfig
from ara.config.sizes import bytes_in
from ara.decomposition.base import Decomposition
from ara.decomposition.parallel import factorisation_bytes, workers_for
from ara.decomposition.two_sided import TwoSidedOptions
from ara.layouts import layout_named
from ara.models.disk import factor_bytes
from ara.models.memory import place_of_weights
from ara.models.scores import CHUNK_BYTES, LOSS_TENSORS
from ara.models.weights import LinearSpec, by_block
from ara.planning.shape import ModelShape
from ara.planning.sizes import checkpoint_bytes, largest_layer_bytes, moment_bytes
from ara.planning.work import Work, balancing, correction, factorisation, loss, mask_gradient
from ara.recovery.base import OUTPUT_SETS

# Resident memory of a process that has imported torch and transformers, loaded a tokenizer and read a text.
LIBRARIES = 450 << 20
# Memory of a graph per byte that it keeps: between its tensors lie blocks that were freed while it grew. In
# ara decompose of SmolLM2-135M, in bfloat16 on a CPU, the graph of 4 × 512 tokens took 1,566 MiB and kept 1,190.
_GRAPH = 1.3
# Tensors like the logits that a loss needs: the logits, an absolute value and two masks in the check for NaN
# (ara.calibration.gradients), then the gradient (ara.models.losses).
_LOSS = 3.5
# 1 / share of the free memory that moments, kept outputs of blocks, and kept inputs of layers each may take
# (ara.stages.factoring, ara.models.blocks, ara.recovery.dense_side).
_SHARE = 4
# Tensors of the widest layer that a forward pass without a graph holds at once, about.
_TRANSIENT = 6
# eval loads its models together if they take this share of the free memory (ara.stages.common.groups_in_memory).
_TOGETHER = 0.8


@dataclass(frozen=True)
class Need:
    """What a stage needs.

    Attributes:
        stage: its command.
        work: what it computes and writes.
        disk: bytes that stay on the disk.
        scratch: bytes that it writes beside them and removes at its end.
        weights: bytes of the weights of its models; pages of files if these have the dtype of the run.
        pages: bytes of further weights that are pages of files, or can be: of factors, of a model that is changed.
        held: bytes of everything else in memory, with the libraries.
        optional: whether the pipeline is complete without the stage.
    """

    stage: str
    work: Work
    disk: int
    weights: int = 0
    pages: int = 0
    held: int = 0
    scratch: int = 0
    optional: bool = False


@dataclass(frozen=True)
class Settings:
    """Configs of the stages, of which a plan sets some fields.

    Attributes:
        method: the decomposition.
        tuning, masks, truncate, recover, evaluate: of the other stages.
        eval_tokens: tokens of the text that ``ara eval`` reads.
        eval_seq_len: its window.
        ranks: layer → rank of the low-rank layers; none for the dense model.
        on_gpu: whether the model is in the memory of a GPU, where the libraries are not.
    """

    decompose: DecomposeConfig
    method: Decomposition
    tuning: TuningConfig
    masks: TrainMasksConfig
    truncate: TruncateConfig
    recover: RecoverConfig
    evaluate: EvalConfig
    eval_tokens: int
    eval_seq_len: int
    ranks: Mapping[str, int]
    on_gpu: bool = False

    @property
    def libraries(self) -> int:
        """Memory of Python and its libraries beside the tensors."""
        return 0 if self.on_gpu else LIBRARIES

    def workers(self, layers: Sequence[LinearSpec], free: int) -> int:
        """Return how many of the layers are factorised at once."""
        return 1 if self.on_gpu else workers_for(layers, free)


Needs = Callable[[ModelShape, Settings, int], Need]


def decompose(shape: ModelShape, settings: Settings, free: int) -> Need:
    """Return what ``ara decompose`` needs with ``free`` bytes of memory (ara.stages.factoring)."""
    config, method = settings.decompose, settings.method
    disk = factor_bytes(shape.specs, shape.stored.itemsize)
    chunks = read_in(shape, settings, free)
    work, reading, moments, kept = Work(), 0, 0, 0
    if method.needs_text:
        disk += moment_bytes(shape) if config.keep_moments != "no" else 0
        moments = max(_accumulators(shape, chunk, method.needs_gradients) for chunk in chunks)
        tokens = config.samples * config.seq_len
        work += shape.window.forward(config.samples, head=False)
        work += _gram([(spec.n, shape.seen(spec)) for spec in shape.leaders], tokens)
        reading = _transient(shape, config.batch_size, config.seq_len)
        output = config.seq_len * shape.hidden * shape.dtype.itemsize
        cuts = len(chunks) - 1
        kept = min(config.samples * output, free // _SHARE) if cuts else 0
        if method.needs_gradients:
            assert isinstance(method.options, TwoSidedOptions)
            windows = max(1, round(method.options.gradient_share * config.samples))
            work += shape.window.forward(windows) + shape.window.backward(windows)
            separate = [spec for spec in shape.specs if spec.experts == 1]
            work += _gram([(spec.m, shape.share(spec)) for spec in separate], windows * config.seq_len)
            work += loss(shape.vocabulary, windows * config.seq_len)
            work += _again(shape, chunks[1:], windows, config.seq_len)
            reading = _graph(shape, settings, config.batch_size, config.seq_len, free)
            kept += min(2 * cuts * windows * output, free // _SHARE)
    for spec in shape.specs:
        work += factorisation(spec, method.needs_text, method.needs_gradients)
    block = _largest_block(shape)
    factoring = settings.workers(block, free) * max(map(factorisation_bytes, block))
    factoring += factor_bytes(block, shape.stored.itemsize)
    held = settings.libraries + moments + kept + max(reading, factoring)
    return Need("decompose", _writing(work, disk), disk, shape.weight_bytes, held=held)


def _again(shape: ModelShape, later: Sequence[Sequence[LinearSpec]], windows: int, seq_len: int) -> Work:
    """Return the work of the gradients of later chunks (ara.models.blocks.BlockRunner.backward).

    The first chunk needs a pass through the whole model. Each later one runs its blocks once more, forward and
    backward, and the last one the head and the loss as well.
    """
    if not later:
        return Work()
    share = sum(len(by_block(chunk)) for chunk in later) / shape.blocks
    blocks = shape.window.forward(windows, head=False) + shape.window.backward(windows, head=False)
    return blocks * share + Work(products=2.0 * shape.window.head * windows) + loss(shape.vocabulary, windows * seq_len)


def read_in(shape: ModelShape, settings: Settings, free: int) -> list[list[LinearSpec]]:
    """Return the chunks of blocks whose second moments ``ara decompose`` collects at once (ara.stages.factoring)."""
    config, method = settings.decompose, settings.method
    if not method.needs_text:
        return [list(shape.specs)]
    limit = free // _SHARE if config.moment_memory is None else int(config.moment_memory * 2**30)
    return split_into_chunks(shape.specs, shape.owners, method.needs_gradients, limit)


def train_masks(shape: ModelShape, settings: Settings, free: int) -> Need:
    """Return what ``ara train-masks`` needs for one budget (ara.masks.loop)."""
    config, seq_len = settings.masks, settings.decompose.seq_len
    work = _table(shape, settings)
    windows = config.steps * config.batch
    # The teacher's pass, then that of the cut model.
    work += shape.window.forward(windows) * 2 + shape.window.backward(windows)
    work += loss(shape.vocabulary, windows * seq_len) * 2
    work += _masks(shape, windows * seq_len)
    checks = config.steps // config.check_every + 1
    work += _cut_forward(shape, settings, checks * config.held_out, seq_len)
    disk = 2 * 8 * sum(spec.full_rank + 1 for spec in shape.specs)
    held = (
        settings.libraries
        + _graph(shape, settings, config.batch_size, seq_len, free, masks=True)
        + _logits(shape, config.batch_size, seq_len)
    )
    pages, copied = _factors(shape)
    held += copied
    return Need("train-masks", _writing(work, disk), disk, shape.weight_bytes, pages, held, optional=True)


def allocate(shape: ModelShape, settings: Settings, free: int) -> Need:
    """Return what ``ara allocate`` needs by its default method without trained masks, ``sensitivity``."""
    config, seq_len = settings.tuning, settings.decompose.seq_len
    # The guard reads the held-out windows with the dense model, the chosen ranks and uniform ones.
    work = _table(shape, settings) + shape.window.forward(config.held_out)
    work += _cut_forward(shape, settings, 2 * config.held_out, seq_len)
    disk = 8 * sum(spec.full_rank + 1 for spec in shape.specs)
    pages, copied = _factors(shape)
    held = settings.libraries + copied + _graph(shape, settings, config.batch_size, seq_len, free, masks=True)
    return Need("allocate", _writing(work, disk), disk, shape.weight_bytes, pages, held)


def truncate(shape: ModelShape, settings: Settings, free: int) -> Need:
    """Return what ``ara truncate`` needs: one file of weights and one layer in memory (ara.models.shards)."""
    disk = checkpoint_bytes(shape, settings.ranks)
    file = min(disk, int(bytes_in(settings.truncate.max_shard_size)))
    held = settings.libraries + file + largest_layer_bytes(shape.specs)
    return Need("truncate", _writing(Work(), disk), disk, held=held)


def recover(shape: ModelShape, settings: Settings, free: int) -> Need:
    """Return what ``ara recover`` needs at the level ``closed`` (ara.recovery.closed, ara.stages.recovery_place)."""
    config, seq_len = settings.recover, settings.decompose.seq_len
    itemsize, ranks = shape.dtype.itemsize, settings.ranks
    compressed = checkpoint_bytes(shape, ranks, header=False, dtype=shape.dtype)
    windows = config.samples + config.held_out
    work = shape.window.forward(windows, head=False)
    # The compressed model runs a block once per group of layers, up to the group, and once more for its output.
    share = 1 + _prefixes(shape)
    work += _cut_forward(shape, settings, windows * share, seq_len, head=False)
    for spec in shape.leaders:
        train, held_out = (count * seq_len for count in (config.samples, config.held_out))
        n2, gram = 2.0 * spec.n * spec.n, gram_flops(spec.n)
        work += Work(single=train * (n2 + gram) + held_out * (n2 + 2 * gram)) * shape.seen(spec)
    for spec in shape.specs:
        work += correction(spec, ranks.get(spec.name))
        if spec.name in ranks:
            work += balancing(spec, ranks[spec.name])
    # The distance from the dense model before and after.
    work += shape.window.forward(2 * config.held_out) + loss(shape.vocabulary, 2 * config.held_out * seq_len)
    work += _cut_forward(shape, settings, 2 * config.held_out, seq_len)
    tokens = windows * seq_len
    # Outputs of the present block: of the dense model, of the compressed one, and the next ones while they are made.
    outputs = tokens * shape.hidden * itemsize
    streams, in_files = 4 * outputs, 0
    if not settings.on_gpu and OUTPUT_SETS * outputs > free // _SHARE:
        streams, in_files = 0, streams
    first = [spec for spec in shape.leaders if spec.layer == shape.leaders[0].layer]
    inputs = tokens * itemsize * (sum(spec.n for spec in first) + shape.hidden)
    inputs = inputs if inputs <= free // _SHARE else 0
    widest = max(shape.specs, key=lambda spec: spec.n)
    held = settings.libraries + streams + inputs + _correction_bytes(shape, settings, widest, free)
    # Freed memory stays with the process, so the logits of the distance count as well.
    held += 2 * _logits(shape, config.batch_size, seq_len)
    # The compressed model changes. Where it does not fit, its weights are pages of files.
    pages = 0 if settings.on_gpu else compressed
    held += compressed - pages
    in_files += pages if place_of_weights(pages, free) != "memory" else 0
    disk = checkpoint_bytes(shape, ranks)
    # Every block, and the states before and after the level.
    states = sum(_stored(spec, ranks.get(spec.name)) for spec in shape.specs) * itemsize + 2 * compressed
    written = _writing(work, disk + states + in_files)
    return Need("recover", written, disk, shape.weight_bytes, pages, held, scratch=states + in_files)


def evaluate(shape: ModelShape, settings: Settings, free: int) -> Need:
    """Return what ``ara eval`` needs for perplexity on one text (ara.stages.measure)."""
    config, seq_len = settings.evaluate, settings.eval_seq_len
    windows = settings.eval_tokens / seq_len
    work = shape.window.forward(windows, seq_len) + _cut_forward(shape, settings, 2 * windows, seq_len)
    work += loss(shape.vocabulary, round(3 * settings.eval_tokens))
    compressed = checkpoint_bytes(shape, settings.ranks, header=False, dtype=shape.dtype)
    together = 3 * shape.weight_bytes < _TOGETHER * free
    # The model with uniform ranks: its low-rank layers and, of these, what is made in memory.
    low_rank, made = _uniform(shape, settings)
    # The checkpoint, which transformers converts in memory if its dtype is another one.
    pages, converted = (compressed, 0) if shape.stored == shape.dtype else (0, compressed)
    held = (
        settings.libraries
        + (made + converted if together else max(made, converted))
        + 3 * _logits(shape, config.batch_size, seq_len)
        + _transient(shape, config.batch_size, seq_len)
    )
    # Its other weights are loaded with those of the dense model.
    weights = shape.weight_bytes + (compressed - low_rank if together else 0)
    pages = pages + low_rank - made if together else 0
    return Need("eval", work, 0, weights, pages, held)


def export(shape: ModelShape, settings: Settings, free: int) -> Need:
    """Return what ``ara export --onnx`` needs on a CPU: a graph in float32, compared with the checkpoint in torch."""
    disk = checkpoint_bytes(shape, settings.ranks, header=False, dtype=torch.float32)
    # The comparison has one of the two in memory, the model in float32 or the graph.
    return Need("export", _writing(Work(), disk), disk, held=settings.libraries + disk, optional=True)


STAGES: tuple[Needs, ...] = (decompose, train_masks, allocate, truncate, recover, evaluate, export)


def _factors(shape: ModelShape) -> tuple[int, int]:
    """Return the bytes of all factors that are pages of files, and of those that are in memory (ara.masks.model).

    Factors of another dtype than that of the run are converted in memory.
    """
    if shape.stored == shape.dtype:
        return factor_bytes(shape.specs, shape.stored.itemsize), 0
    return 0, factor_bytes(shape.specs, shape.dtype.itemsize)


def _uniform(shape: ModelShape, settings: Settings) -> tuple[int, int]:
    """Return the bytes of the low-rank layers that are built from factors, and of what is no page of their files.

    The first rows of A are a part of their file, the first columns of B are not (ara.models.low_rank).
    """
    all_bytes = made = 0
    for spec in (spec for spec in shape.specs if spec.name in settings.ranks):
        rank = settings.ranks[spec.name]
        size = spec.cost(rank) * shape.dtype.itemsize
        all_bytes += size
        views = layout_named(spec.layout).as_given and shape.stored == shape.dtype
        made += size - (rank * spec.n * shape.dtype.itemsize if views else 0)
    return all_bytes, made


def _table(shape: ModelShape, settings: Settings) -> Work:
    """Return the work of the sensitivity table."""
    windows, seq_len = settings.tuning.samples, settings.decompose.seq_len
    work = shape.window.forward(windows) + shape.window.backward(windows) + loss(shape.vocabulary, windows * seq_len)
    return work + _masks(shape, windows * seq_len)


def _masks(shape: ModelShape, tokens: int) -> Work:
    return sum((mask_gradient(spec, tokens) * shape.share(spec) for spec in shape.specs), Work())


def _gram(widths: Sequence[tuple[int, float]], tokens: int) -> Work:
    """Return the work of second moments: products, and the copy in float32 with the sum of its magnitudes.

    Args:
        widths: of the vectors, and the share of the tokens that have one.
        tokens: their number.
    """
    flops = sum(share * gram_flops(width) for width, share in widths)
    return Work(single=flops * tokens, moved=16.0 * sum(share * width for width, share in widths) * tokens)


def _cut_forward(shape: ModelShape, settings: Settings, windows: float, seq_len: int, head: bool = True) -> Work:
    """Return the work of forward passes of the compressed model."""
    dense = shape.window.forward(windows, seq_len, head=head)
    more = sum(
        shape.share(spec) * (_stored(spec, settings.ranks.get(spec.name)) - spec.dense_cost) for spec in shape.specs
    )
    return dense + Work(products=2.0 * more * windows * seq_len)


def _stored(spec: LinearSpec, rank: int | None) -> int:
    return spec.dense_cost if rank is None else spec.cost(rank)


def _prefixes(shape: ModelShape) -> float:
    """Return how much of a pass through the blocks precedes each group of layers, summed over the groups.

    One layer of all experts is read in one pass.
    """
    total = whole = 0.0
    for block in by_block(shape.specs):
        before, read = 0.0, set[str]()
        for spec in block:
            step = spec.pool or spec.name
            if shape.owners[spec.name] == spec.name and step not in read:
                total += before
                read.add(step)
            before += spec.dense_cost * shape.share(spec)
        whole += before
    return total / whole


def _accumulators(shape: ModelShape, chunk: Sequence[LinearSpec], gradients: bool) -> int:
    widths = [spec.n for spec in chunk if shape.owners[spec.name] == spec.name]
    widths += {spec.pool: spec.n for spec in chunk if spec.pool is not None}.values()
    outputs: list[int] = []
    if gradients:
        outputs += map(gradient_bytes, chunk)
        outputs += {spec.pool: gradient_bytes(spec) for spec in chunk if spec.pool is not None}.values()
    return sum(map(InputAccumulator.bytes_for, widths)) + sum(outputs)


def _largest_block(shape: ModelShape) -> list[LinearSpec]:
    return max(by_block(shape.specs), key=lambda block: sum(spec.dense_cost for spec in block))


def _logits(shape: ModelShape, windows: int, seq_len: int) -> int:
    """Return the memory of the logits that exist at once (ara.models.scores)."""
    return min(windows * seq_len * shape.vocabulary * shape.dtype.itemsize, CHUNK_BYTES)


def _graph(shape: ModelShape, settings: Settings, windows: int, seq_len: int, free: int, masks: bool = False) -> int:
    """Return the memory of a forward pass with its graph, and of the loss."""
    kept = shape.window.kept * windows
    if masks:
        # Each layer keeps its input.
        inputs = sum(spec.n * shape.seen(spec) for spec in shape.leaders)
        kept += int(windows * seq_len * inputs * shape.dtype.itemsize)
    logits = _logits(shape, windows, seq_len)
    if kept + LOSS_TENSORS * logits > free // 2:
        # The blocks are computed again (ara.models.recompute): one block's graph is kept. The inputs of all blocks are
        # in files, except on a GPU.
        inputs = windows * seq_len * shape.hidden * shape.dtype.itemsize * shape.blocks if settings.on_gpu else 0
        kept = inputs + kept // shape.blocks
    return int(_GRAPH * kept + _LOSS * logits)


def _transient(shape: ModelShape, windows: int, seq_len: int) -> int:
    widest = max(max(spec.m, spec.n) for spec in shape.specs)
    return _TRANSIENT * windows * seq_len * widest * shape.dtype.itemsize


def _correction_bytes(shape: ModelShape, settings: Settings, widest: LinearSpec, free: int) -> int:
    """Return the memory of correcting the layers with the widest inputs: moments, and what each layer adds."""
    from ara.recovery.correction import LAMBDAS

    m, n, r = widest.m, widest.n, widest.full_rank
    # In float64: C and S of the text to fit to; G, C and S of the held-out text; the drift of both.
    moments = 8 * (5 * n * n + 3 * m * n + m * m)
    # Cholesky factor and D of every λ, A D of every λ, and a few matrices like A.
    own = 8 * (2 * len(LAMBDAS) * n * n + (len(LAMBDAS) + 6) * r * n)
    group = [spec for spec in shape.specs if shape.owners[spec.name] == shape.owners[widest.name]]
    return moments + settings.workers(group, free) * own


def _writing(work: Work, written: int) -> Work:
    return work + Work(written=float(written))
