"""``ara allocate --ranks FILE``: ranks that are given instead of chosen."""

from __future__ import annotations

from pathlib import Path

from ara.artifacts.ranks_file import read_layout, read_ranks
from ara.config import AllocateConfig
from ara.errors import UsageError
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.models.weights import LinearSpec
from ara.solver.problem import Allocation, Budget
from ara.stages.allocate_bytes import SIZES


def refuse_method_settings(config: AllocateConfig) -> None:
    """Check that no setting of a method is given together with a ranks file."""
    unset = AllocateConfig(keep=config.keep)
    given = [
        key
        for key in ("objective", "method", "options", "rank_multiple", "min_rank", "min_keep", "exclude", *SIZES)
        if getattr(config, key) != getattr(unset, key)
    ]
    if given:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in given).replace("--options", "--option")
        raise UsageError(f"--ranks FILE and {flags} are both given", "the file gives every rank: omit the others")


def from_file(config: AllocateConfig, path: Path, specs: list[LinearSpec]) -> Allocation:
    """Return the ranks of a file.

    Raises:
        AraError: the file does not fit the model, or exceeds the budget, if there is one.
    """
    allocation = read_ranks(path, specs)
    if config.keep is not None:
        limit = Budget.for_keep(specs, config.keep).limit
        if allocation.cost > limit:
            raise UsageError(
                f"the ranks in {path} cost {allocation.cost:,} parameters; keep {config.keep:g} allows {limit:,}",
                f"lower some ranks, or give --keep {allocation.keep(specs) + 0.0005:.3f}, or no --keep at all",
            )
    return allocation


def layout_in(path: Path, asked: LayoutName) -> LayoutName:
    """Return the layout that a ranks file names."""
    layout = read_layout(path)
    if asked not in (DEFAULT_LAYOUT, layout):
        raise UsageError(f"{path} names the layout {layout}, but --layout {asked} is given", "omit --layout")
    return layout
