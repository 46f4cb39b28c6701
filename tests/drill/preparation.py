"""What a drill begins with: imported libraries, folders to begin in, and what commands do undisturbed."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import shutil
import signal
from collections.abc import Collection
from pathlib import Path

from tests.drill.cases import Reference, make_reference
from tests.drill.disk import Disk
from tests.drill.process import Fault, ara
from tests.drill.stages import SCENARIOS, Scenario

# What commands import from others when they run. Not onnxruntime: it starts threads, and no fork survives those.
_LIBRARIES = (
    "ara.decomposition.two_sided", "ara.models.checkpoint", "ara.reporting.html", "ara_cli.app", "ara_cli.render",
    "ara_cli.render_bench", "ara_cli.render_eval", "accelerate", "concurrent.futures.process",
    "matplotlib.backends.backend_svg", "matplotlib.figure", "onnx_ir", "onnx", "scipy.special", "tests.exportable",
    "transformers.generation.utils", "transformers.loss.loss_utils", "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)  # fmt: skip


def import_libraries() -> None:
    """Import what the commands need, once for all forks."""
    for package in ("ara.stages", "ara.allocation", "ara_cli.commands"):
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)
    for name in _LIBRARIES:
        importlib.import_module(name)


def chain_to(wanted: Collection[str]) -> list[Scenario]:
    """Return the scenarios that must have been run for ``wanted``, and those themselves, in their order."""
    needed = set(wanted)
    for scenario in reversed(SCENARIOS.values()):
        if scenario.name in needed:
            needed |= set(scenario.needs)
    return [scenario for scenario in SCENARIOS.values() if scenario.name in needed]


def prepare(root: Path, wanted: Collection[str], disk: Disk) -> tuple[dict[str, Reference], Path]:
    """Run each scenario after the ones before it.

    Args:
        root: where folders to begin with are kept.
        wanted: names of scenarios.
        disk: to work on.

    Returns:
        Name → reference of all that were run, and the folder in which everything is finished.
    """
    seed = current = _seed(root / "seed")
    chain, references = chain_to(wanted), {}
    for scenario in chain:
        if scenario.name == "run":
            references[scenario.name] = make_reference(scenario, seed, disk)
        elif not scenario.again:
            references[scenario.name] = make_reference(scenario, current, disk)
            current = Path(shutil.copytree(disk.root, root / f"{len(references)}"))
    for scenario in chain:
        if scenario.again:
            references[scenario.name] = make_reference(scenario, current, disk)
    return references, current


def cut_off(reference: Reference, root: Path, disk: Disk) -> Reference:
    """Return the same command begun where it was killed before, at about two thirds of its way."""
    for at in range(reference.touches * 2 // 3, 0, -1):
        disk.fill(reference.base)
        ara(reference.scenario.words, disk.root, Fault(signal.SIGKILL, at=at))
        kept = {path.name for path in disk.root.glob("ws/*/.*.partial/*")}
        if ".journal.json" in kept and (reference.scenario.name != "train-masks" or ".checkpoint.safetensors" in kept):
            base = Path(shutil.copytree(disk.root, root / f"cut off {reference.scenario.name}"))
            return Reference(reference.scenario, base, reference.result, 0, 0, 0, 0, "")
    raise RuntimeError(f"{reference.scenario.name} cannot be cut off")


def _seed(folder: Path) -> Path:
    """Make a tiny model and a text in a process of its own: this one must not compute anything before it forks."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            from tests.checkpoints import make_checkpoint
            from tests.tiny import tiny_texts

            made = make_checkpoint(folder, "llama", None)
            made.folder.rename(folder / "model")
            story = "".join(json.dumps({"text": text}) + "\n" for text in tiny_texts())
            (folder / "story.jsonl").write_text(story, encoding="utf-8")
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("no tiny model could be made")
    return folder
