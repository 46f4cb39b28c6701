"""Which ranks the allocations of a workspace use: how many are above the break-even of two factors, mn / (m + n).

    python benchmarks/stored_ranks.py WORKSPACE

``ara decompose --max-keep 1`` stores no rank above it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ara.artifacts.factors import specs_of
from ara.artifacts.ranks import layout_of, read_allocation
from ara.models.disk import rank_to_store
from ara.workspace.store import Workspace


def main() -> None:
    """Print one line per allocation."""
    parser = argparse.ArgumentParser(description="Count ranks above the break-even of two factors.")
    parser.add_argument("workspace", type=Path)
    workspace = Workspace.open(parser.parse_args().workspace)
    for view in workspace.views("ranks"):
        layout = layout_of(view)
        specs = specs_of(workspace.ancestor(view, "factors"), layout)
        allocation = read_allocation(view, specs)
        above = sum(
            rank > (rank_to_store(spec.m, spec.n, 1) or spec.full_rank)
            for spec in specs
            if (rank := allocation.ranks[spec.name]) is not None
        )
        keep = f"{layout}, keep {allocation.keep(specs):.2f}"
        print(f"{view.key}: {keep}: {above} of {len(specs)} layers above break-even, {allocation.dense_count()} dense")


if __name__ == "__main__":
    main()
