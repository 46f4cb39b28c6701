"""The layers of a decomposition, as allocators get them."""

from __future__ import annotations

from safetensors import safe_open

from ara.artifacts.factors import layer_file, specs_of
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.models.weights import by_block
from ara.solver.problem import Module
from ara.workspace.view import StageView


def load_modules(decomposition: StageView, layout: LayoutName = DEFAULT_LAYOUT) -> list[Module]:
    """Read the spectra of a decomposition, but not its factors."""
    modules = []
    for block in by_block(specs_of(decomposition, layout)):
        with safe_open(decomposition.path / layer_file(block[0].layer), "pt") as file:
            for spec in block:
                modules.append(Module(spec, file.get_tensor(f"{spec.name}.spectrum")))
    return modules
