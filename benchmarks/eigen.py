"""The eigenproblem of a decomposition: float64, float32, and float32 improved by one step in float64.

    make bench-eigen                                     # real layers, then sizes up to LLaMA-7B's
    python benchmarks/eigen.py --size 4096 --rounds 1    # one size; --device cuda for a GPU

``ara/decomposition/subspace.py`` needs the eigenvectors of W G Wᵀ, and computes them in float64. Compared with that are
float32, and float32 followed by one refinement of all eigenvectors in float64, which are four products of matrices
(Ogita and Aishima, "Iterative refinement for symmetric eigenvalue decomposition", Japan J. Indust. Appl. Math. 35,
2018, algorithm 1). All ways run in turn. The error of a way is what rank k leaves, over what it leaves in float64, less
one: the worst of keep 0.8, 0.6 and 0.4.

Matrices are those of one block of SmolLM2-135M, and random ones whose inputs fall in size as those of a model do.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from ara_cli.console import Console
from benchmarks.decompose import matrices, synthetic
from benchmarks.in_turn import seconds_in_turn

KEEPS = (0.8, 0.6, 0.4)
# Sizes of random matrices: hidden widths of a 1B, a 3B and a 7B model.
SIZES = (1024, 2048, 4096)


def in_float64(matrix: torch.Tensor) -> torch.Tensor:
    """Return the eigenvectors of a symmetric matrix (n, n) float64 as columns, eigenvalues falling."""
    return torch.linalg.eigh(matrix).eigenvectors.flip(1)


def in_float32(matrix: torch.Tensor) -> torch.Tensor:
    """Return them computed in float32, as float64."""
    # Without a scale, small entries would be lost where float32 has no more exponents.
    scaled = matrix / matrix.diagonal().max()
    return in_float64(scaled.float()).double()


def refined(matrix: torch.Tensor) -> torch.Tensor:
    """Return them computed in float32, and refined once in float64."""
    vectors = in_float32(matrix)
    overlap = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) - vectors.T @ vectors
    projected = vectors.T @ (matrix @ vectors)
    values = projected.diagonal() / (1 - overlap.diagonal())
    gaps = values[None, :] - values[:, None]
    size = values.abs().max()
    rest = projected - torch.diag(values)
    # Vectors of values that cannot be told apart are only made orthogonal.
    apart = 2 * (torch.linalg.matrix_norm(rest) + size * torch.linalg.matrix_norm(overlap))
    # The bound of the paper is for the spectral norm; below it, a quotient would be noise.
    near = gaps.abs() <= apart / len(matrix) ** 0.5
    change = torch.where(near, overlap / 2, (projected + values[None, :] * overlap) / gaps.masked_fill(near, 1))
    return vectors + vectors @ change


WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float64": in_float64,
    "float32": in_float32,
    "float32, refined in float64": refined,
}


def left(matrix: torch.Tensor, vectors: torch.Tensor, rank: int) -> float:
    """Return the squared error that projecting onto the first ``rank`` vectors leaves, orthonormal or not."""
    first = vectors[:, :rank]
    image = matrix @ first
    inner = first.T @ image
    return float(matrix.trace() - 2 * inner.trace() + (inner * (first.T @ first)).sum())


def problem(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return W G Wᵀ of the side of W (m, n) that is shorter, (r, r); float64."""
    if weight.shape[0] > weight.shape[1]:
        weight = torch.linalg.qr(weight).R
    product = weight @ gram @ weight.T
    return (product + product.T) / 2


def compare(console: Console, name: str, weight: torch.Tensor, gram: torch.Tensor, rounds: int) -> dict[str, float]:
    """Print and return how many times as fast as float64 every way is; with its error."""
    matrix = problem(weight, gram)
    found: dict[str, torch.Tensor] = {}

    def step(way: str) -> Callable[[], None]:
        def run() -> None:
            found[way] = WAYS[way](matrix)

        return run

    seconds = seconds_in_turn(console, {way: step(way) for way in WAYS}, rounds, matrix.device)
    m, n = weight.shape
    ranks = [int(keep * m * n / (m + n)) for keep in KEEPS]
    exact = [left(matrix, found["float64"], rank) for rank in ranks]
    faster = {}
    for way in WAYS:
        faster[way] = statistics.median(a / b for a, b in zip(seconds["float64"], seconds[way], strict=True))
        worse = max(left(matrix, found[way], rank) / best - 1 for rank, best in zip(ranks, exact, strict=True))
        console.text(
            f"{name}, {len(matrix)}: {way}: {statistics.median(seconds[way]):.3f} s, {faster[way]:.2f} times as fast, "
            f"error {worse:+.1e}"
        )
    return faster


def main() -> None:
    """Compare the ways on real layers, unless sizes are given, and on random matrices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, action="append", help="only random matrices of this size; may be repeated")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 512 tokens for the real layers")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, after one that warms up")
    parser.add_argument("--device", default="cpu", help="as torch names it")
    arguments = parser.parse_args()
    console = Console()
    sizes = arguments.size or SIZES
    tensors = {} if arguments.size else matrices(1, arguments.samples)
    names = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    for name in names:
        weight, gram = (tensors[f"{name}.{part}"].to(arguments.device) for part in ("weight", "gram"))
        compare(console, name, weight, gram, arguments.rounds)
    for size in sizes:
        made = synthetic([f"{size}x{size}"])
        weight, gram = (tensor.to(arguments.device) for tensor in made.values())
        compare(console, "random", weight, gram, arguments.rounds)


if __name__ == "__main__":
    main()
