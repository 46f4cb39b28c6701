"""How fast this machine is, by a probe of about five seconds at most: products, eigenproblems, copies, the disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ara.decomposition.parallel import map_layers
from ara.errors import disk_errors
from ara.evaluation.timing import synchronize
from ara.models.weights import LinearSpec
from ara.planning.shape import ModelShape
from ara.planning.work import Work

# Seconds for which a product or a copy is repeated; the first run, which warms up, is not counted.
_SECONDS = 0.4
# Rows and widths of the products at most: larger ones are no faster per FLOP, and take longer.
_ROWS, _WIDTH = 2048, 2048
# Heads, tokens and width of a head of the attention.
_HEADS, _ATTENDED, _HEAD_WIDTH = 16, 512, 64
# Width of the eigenproblem: large enough for its time to grow with the cube.
_EIGEN_WIDTH = 768
# Bytes written to the disk at most, and per write.
_DISK_BYTES, _WRITE_BYTES = 128 << 20, 16 << 20


@dataclass(frozen=True)
class Speed:
    """What a machine does per second; the fields are those of :class:`ara.planning.work.Work`.

    Attributes:
        products, single, double: FLOPs of products in the run's dtype, in float32, in float64.
        attention: FLOPs of causal attention.
        eigen: r³ of eigenproblems in float64, as many at once as the machine has threads.
        moved: bytes read and written by an operation on single numbers.
        written: bytes written to the disk, with their checksum.
    """

    products: float
    attention: float
    single: float
    double: float
    eigen: float
    moved: float
    written: float

    def seconds(self, work: Work) -> float:
        """Return how long the machine needs, one kind of work after the other, without the start of Python."""
        return sum(getattr(work, field.name) / getattr(self, field.name) for field in fields(self))


def probe(shape: ModelShape, device: str, rows: int, folder: Path) -> Speed:
    """Measure this machine at sizes like those of the model.

    Args:
        shape: gives the dtype and the widths.
        device: of the run.
        rows: tokens of a batch.
        folder: on the disk that will be written; it exists.

    Raises:
        DiskFullError: there is no room for the probe's file, which is removed.
    """
    rows, width = min(rows, _ROWS), _typical_width(shape)
    # Apple's GPUs have no float64; factorisations run on the CPU there.
    wide = "cpu" if torch.device(device).type == "mps" else device
    return Speed(
        products=_products(rows, width, shape.dtype, device),
        attention=_attention(shape.dtype, device),
        single=_products(rows, width, torch.float32, device),
        double=_products(min(rows, width), width, torch.float64, wide),
        eigen=_eigen(wide),
        moved=_moved(rows, width, shape.dtype, device),
        written=_written(folder),
    )


def _typical_width(shape: ModelShape) -> int:
    """Return the side of a square with as many parameters as a parameter lies in on average, within the limit."""
    total = sum(spec.dense_cost for spec in shape.specs)
    mean = sum(spec.dense_cost**1.5 for spec in shape.specs) / total
    return min(_WIDTH, max(1, round(mean)))


@torch.inference_mode()
def _products(rows: int, width: int, dtype: torch.dtype, device: str) -> float:
    x, w = (torch.full((size, width), 0.01, dtype=dtype, device=device) for size in (rows, width))
    return 2.0 * rows * width * width * _per_second(lambda: torch.nn.functional.linear(x, w), device)


@torch.inference_mode()
def _attention(dtype: torch.dtype, device: str) -> float:
    size = (1, _HEADS, _ATTENDED, _HEAD_WIDTH)
    q, k, v = (torch.full(size, 0.01, dtype=dtype, device=device) for _ in range(3))
    flops = 2.0 * q.numel() * _ATTENDED
    attend = torch.nn.functional.scaled_dot_product_attention
    return flops * _per_second(lambda: attend(q, k, v, is_causal=True), device)


@torch.inference_mode()
def _moved(rows: int, width: int, dtype: torch.dtype, device: str) -> float:
    x, y = (torch.full((rows, width), 0.01, dtype=dtype, device=device) for _ in range(2))
    return 3.0 * rows * width * dtype.itemsize * _per_second(lambda: x * y, device)


@torch.inference_mode()
def _eigen(device: str) -> float:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(_EIGEN_WIDTH, _EIGEN_WIDTH, dtype=torch.float64, generator=generator)
    matrix = (matrix + matrix.T).to(device)
    on_cpu = torch.device(device).type == "cpu"
    layers = [(LinearSpec("probe", 0, "probe", 1, 1), None)] * (torch.get_num_threads() if on_cpu else 1)
    small = matrix[:64, :64]
    torch.linalg.eigh(small)
    synchronize(torch.device(device))
    start = time.perf_counter()
    list(map_layers(lambda spec, _: torch.linalg.eigh(matrix), layers, device))
    synchronize(torch.device(device))
    return len(layers) * float(_EIGEN_WIDTH) ** 3 / (time.perf_counter() - start)


def _written(folder: Path) -> float:
    """Return the bytes per second of writing a file, flushing it to the disk, and of its checksum."""
    data = os.urandom(_WRITE_BYTES)
    done, start = 0, time.perf_counter()
    with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        while done < _DISK_BYTES and (done == 0 or time.perf_counter() - start < _SECONDS):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            hashlib.sha256(data).digest()
            done += len(data)
    return done / (time.perf_counter() - start)


def _per_second(call: Callable[[], object], device: str) -> float:
    """Return how often per second ``call`` runs."""
    place = torch.device(device)
    call()
    synchronize(place)
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < _SECONDS:
        call()
        synchronize(place)
        count += 1
    return count / (time.perf_counter() - start)
