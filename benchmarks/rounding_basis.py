"""What rounding a low-rank layer to few bits loses: factors of the components, of a mixed basis, and pivoted.

    python benchmarks/rounding_basis.py --workspace bench-bytes/twin      # after make bench-bytes, or any ara decompose

Every layer of some blocks is cut at half of the largest rank that costs less than the dense weight in two factors, and
rounded with the second moments that the decomposition has kept. The table has the energy of the error of the outputs
as a share of the energy of the outputs, in the metric of the factors (:mod:`ara.allocation.joint`): the geometric mean
over the layers of a kind, and of the dense weight beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from ara.allocation.joint import energy_of, rounded_product
from ara.artifacts.factors import factor_files, specs_of
from ara.layouts import layout_named
from ara.layouts.grid import Grid
from ara.models.weights import LinearSpec
from ara.quantisation.calibrated import round_calibrated, round_product
from ara.stages.common import Run
from ara.stages.moments import kept_moments
from ara.workspace.store import Workspace
from ara_cli.console import Console, columns

FORMS = ("dense", "components", "mixed basis", "pivoted")


def shares(spec: LinearSpec, a: torch.Tensor, b: torch.Tensor, moment: torch.Tensor, grid: Grid) -> dict[str, float]:
    """Return form → share of the energy that rounding takes, of one layer.

    Args:
        spec: the layer.
        a: A (r, n) float64, all components.
        b: B (m, r) float64.
        moment: G (n, n) float64.
        grid: to round to.
    """
    energy, weight = energy_of(b, moment), b @ a
    k = max(1, layout_named("factors").top_rank(spec.m, spec.n) // 2)
    a, b = a[:k], b[:, :k]
    kept = b @ a
    first, second = round_product(a, b, moment, grid)
    rounded = {
        "components": second.weight().double() @ first.weight().double(),
        "mixed basis": rounded_product(replace(spec, layout="factors"), a, b, moment, grid),
        "pivoted": rounded_product(replace(spec, layout="pivoted"), a, b, moment, grid),
    }
    dense = round_calibrated(weight, moment, grid).weight().double()
    return {
        "dense": energy(dense - weight) / energy(weight),
        **{form: energy(one - kept) / energy(kept) for form, one in rounded.items()},
    }


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=Path("ara-workspace"), help="with a decomposition")
    parser.add_argument("--factors", help="its name, if there are several")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8), help="per weight")
    parser.add_argument("--block", type=int, default=32, help="weights that share a scale and a zero point")
    parser.add_argument("--every", type=int, default=5, metavar="N", help="measure every Nth block")
    arguments = parser.parse_args(words)
    console = Console()
    run = Run(arguments.workspace, "python benchmarks/rounding_basis.py", console)
    decomposition = Workspace.open(arguments.workspace).require("factors", arguments.factors)
    moments = kept_moments(decomposition, run)
    if moments is None:
        sys.exit("error: this decomposition has kept no second moments\nhint: ara decompose --keep-moments yes")
    grid = Grid(arguments.bits, arguments.block, True)
    specs = [spec for spec in specs_of(decomposition) if spec.layer % arguments.every == 0]
    files = factor_files(decomposition, specs)
    found: dict[str, list[dict[str, float]]] = {}
    with console.bar("Rounding layers", len(specs)) as bar:
        for spec in specs:
            with safe_open(files[spec.name], "pt") as file:
                a, b = (file.get_tensor(f"{spec.name}.{part}").double() for part in "AB")
            found.setdefault(spec.kind, []).append(shares(spec, a, b, moments[spec.name].double(), grid))
            bar.advance()
    rows = [
        (kind, *(f"{math.exp(sum(math.log(row[form]) for row in rows) / len(rows)):.1e}" for form in FORMS))
        for kind, rows in found.items()
    ]
    title = f"Energy lost by rounding to {grid.bits} bits, blocks of {grid.block}; {len(specs)} layers at half rank"
    console.table(title, columns("layers", *FORMS), rows)


if __name__ == "__main__":
    main()
