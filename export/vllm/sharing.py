"""Which matrices of a checkpoint one layer of vLLM consists of, and which share of each a process holds.

vLLM computes q, k and v as one layer, and gate and up as another. With tensor parallelism every process holds some rows
of the weight of a column-parallel layer, or some columns of the weight of a row-parallel one. Shapes: ``m`` out
features, ``n`` in features, both of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ara.errors import UnsupportedModelError


@dataclass(frozen=True)
class Share:
    """What a process holds of a weight (m, n).

    Attributes:
        m: out features of the whole matrix.
        n: in features of the whole matrix.
        rows: the outputs that the process computes, in their order.
        columns: the inputs that it reads.
    """

    m: int
    n: int
    rows: tuple[slice, ...]
    columns: slice


@dataclass(frozen=True)
class Partition:
    """One range of a layer's outputs that is split evenly over processes, such as those of q.

    Attributes:
        size: outputs of each process.
        pieces: number of pieces; processes share a piece where there are fewer heads than processes.
        piece: index of the one that this process computes.
    """

    size: int
    pieces: int = 1
    piece: int = 0

    @property
    def whole(self) -> int:
        """Outputs of all pieces."""
        return self.size * self.pieces


def names_in(layer: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the paths of the matrices that vLLM's layer called ``layer`` consists of.

    Args:
        layer: path, such as ``model.layers.0.self_attn.qkv_proj``.
        packed: vLLM's table, such as ``qkv_proj`` → ``q_proj``, ``k_proj``, ``v_proj``.
    """
    parent, _, last = layer.rpartition(".")
    return [f"{parent}.{name}" if parent else name for name in packed.get(last, [last])]


def shares(layer: str, matrices: int, partitions: Sequence[Partition], n: int, columns: slice) -> list[Share]:
    """Return the share of each matrix of a layer.

    Args:
        layer: its path, for the error.
        matrices: 1, or one for each partition.
        partitions: of the layer's outputs.
        n: in features of the whole layer.
        columns: the inputs that this process reads.

    Raises:
        UnsupportedModelError: another number of matrices.
    """
    if matrices == len(partitions):
        return [Share(one.whole, n, (_rows(one, 0),), columns) for one in partitions]
    if matrices != 1:
        raise UnsupportedModelError(
            f"{layer} has {len(partitions)} parts in vLLM and {matrices} matrices in the checkpoint, "
            "which ARA cannot match",
            "serve a densified checkpoint: ara truncate --densify",
        )
    starts = [sum(one.whole for one in partitions[:index]) for index in range(len(partitions))]
    rows = tuple(_rows(one, start) for one, start in zip(partitions, starts, strict=True))
    return [Share(sum(one.whole for one in partitions), n, rows, columns)]


def _rows(partition: Partition, start: int) -> slice:
    first = start + partition.piece * partition.size
    return slice(first, first + partition.size)
