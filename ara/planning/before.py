"""What ``ara decompose`` says before it loads the model: sizes that cost nothing to know."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from ara.decomposition.parallel import factorisation_bytes
from ara.models.accounting import parameter_count
from ara.models.memory import available_bytes, place_of_weights
from ara.models.sources import ModelSource
from ara.models.weights import find_linears
from ara.planning.sizes import factor_bytes, stored_weights
from ara.progress import Reporter


def say_sizes(
    source: ModelSource, dtype: torch.dtype, device: str, exclude: Sequence[str], folder: Path, report: Reporter
) -> None:
    """Report what model, factors and checkpoint take, and what is free; warn if the weights fit into no memory.

    Args:
        source: the model; its weights are not read.
        dtype: of the run.
        device: of the run.
        exclude: shell patterns of layers that are not factorised.
        folder: on the disk of the workspace.
        report: receives the lines.

    Raises:
        UnsupportedModelError: no layer can be factorised.
        UsageError: a pattern matches nothing.
    """
    model = source.empty_model().to(dtype)
    linears, parameters = find_linears(model, exclude), parameter_count(model)
    weights, factors = parameters * dtype.itemsize, factor_bytes(linears)
    stored = stored_weights(source, parameters, dtype)
    download = f"; {_mib(stored.download)} of weights are downloaded first" if stored.download else ""
    report.fact(
        f"sizes: model {_mib(weights)}, factors {_mib(factors)}, each checkpoint at most {_mib(weights)}; free: memory "
        f"{_mib(free := available_bytes(device))}, disk {_mib(shutil.disk_usage(folder).free)}{download}"
    )
    # On a CPU weights that do not fit stay in their files, or in a copy in the dtype of the run (ara.models.offload).
    pages = weights if torch.device(device).type == "cpu" else 0
    work = max(map(factorisation_bytes, linears))
    place = place_of_weights(weights - pages, work, free, pages)
    if place == "nowhere":
        report.warn(
            f"too little memory is free: the largest factorisation takes {_mib(work)}, the weights "
            f"{_mib(weights - pages)} "
            "(ara plan says what every stage needs)"
        )


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"
