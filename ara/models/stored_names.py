"""Where the tensors of a model are in its files, which may have other names or hold experts in another form.

transformers renames and merges the tensors of some families while it loads them. Its own rules, those that it has used
for a model, tell here where each tensor comes from, so that one can be read without the others. A file may hold the
experts of a block as one tensor, as a tensor per expert, or as several that are put on top of each other (gate and up).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ara.layouts.modeling_ara import SeparateExperts, expert_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rules that merge one tensor per expert, and then some that are put on top of each other: (class, dim).
_MERGES = ((("MergeModulelist", 0),), (("MergeModulelist", 0), ("Concatenate", 1)))


@dataclass(frozen=True)
class Source:
    """Where a tensor is.

    Attributes:
        keys: names in the files; several tensors are put on top of each other.
        expert: which slice of the tensor it is; ``None`` for the whole one.
        transposed: whether the slices are stored transposed.
        stacked: whether the slices of the tensor are put on top of each other.
    """

    keys: tuple[str, ...]
    expert: int | None = None
    transposed: bool = False
    stacked: bool = False


@dataclass(frozen=True)
class Fused:
    """A parameter of experts as transformers has it, (E, …).

    Attributes:
        parts: names of the tensors of the separate experts, in their order; or of the one of all experts.
        count: number of experts, E.
        transposed: whether it holds them transposed.
    """

    parts: tuple[str, ...]
    count: int
    transposed: bool = False


def fused_parameters(model: torch.nn.Module) -> dict[str, Fused]:
    """Return the parameters that the separate experts of a model had, by their names."""
    found: dict[str, Fused] = {}
    for path, module in model.named_modules():
        if isinstance(module, SeparateExperts):
            for name in expert_parameters(module):
                count = module.num_experts
                separate = isinstance(getattr(module, name), torch.nn.ModuleList)
                layers = [f"{path}.{name}.{expert}" for expert in range(count)] if separate else [f"{path}.{name}"]
                weights, biases = (tuple(f"{layer}.{part}" for layer in layers) for part in ("weight", "bias"))
                found[f"{path}.{name}"] = Fused(weights, count, bool(module.is_transposed))
                if module.has_bias:
                    found[f"{path}.{name}_bias"] = Fused(biases, count)
    return found


@dataclass
class _Merged:
    """The tensors that one rule merges: source pattern → names in the files."""

    patterns: tuple[str, ...]
    keys: dict[str, list[str]] = field(default_factory=dict)


def keeps_names(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Tell whether transformers would load tensors with these names of the model in memory as they are."""
    from transformers.core_model_loading import rename_source_key

    rules = _rules(model)
    return all(rename_source_key(name, *rules) == (name, None) for name in names)


def saved_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Return name in memory → name that ``save_pretrained`` gives it, which is that of the original files.

    Where transformers does more than rename tensors, names stay as they are.
    """
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _rules(model)
    back = [] if converters else [rule.reverse_transform() for rule in reversed(renamings)]
    return {name: rename_source_key(name, back, [])[0] for name in names}


def only_renames(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Tell whether transformers only renames tensors, and finds those called ``names`` by their saved names."""
    from transformers.core_model_loading import rename_source_key

    rules = _rules(model)
    saved = saved_names(model, names)
    return not rules[1] and all(rename_source_key(key, *rules) == (name, None) for name, key in saved.items())


def merges(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Tell whether ``save_pretrained`` would compute other tensors from some of those called ``names``."""
    from transformers.core_model_loading import rename_source_key

    back = [rule.reverse_transform() for rule in reversed(_rules(model)[1])]
    return any(rename_source_key(name, [], back)[1] is not None for name in names)


def _rules(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """Return the renamings and the converters that transformers has used to load a model."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    used = getattr(model, "_weight_conversions", None) or []
    return [one for one in used if isinstance(one, WeightRenaming)], [
        one for one in used if isinstance(one, WeightConverter)
    ]


def sources_of(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, Source]:
    """Return where the tensors of a model are; those that transformers computes in another way are missing.

    Args:
        model: result of ``from_pretrained``, whose experts are separate now.
        keys: names in its files.
    """
    from transformers.core_model_loading import dot_natural_key, rename_source_key

    renamings, converters = _rules(model)
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    fused = fused_parameters(model)
    own = {**dict.fromkeys(fused, True), **dict.fromkeys(model.state_dict(), True)}
    place = {"base_model_prefix": model.base_model_prefix, "meta_state_dict": own}
    found: dict[str, Source] = {}
    merged: dict[str, _Merged] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, **place)
        if name not in own and key in own:
            name, pattern = rename_source_key(key, [], [], **place)
        if pattern is None:
            found[name] = Source((key,))
        else:
            rule = by_pattern[pattern]
            if _operations(rule) in _MERGES:
                entry = merged.setdefault(name, _Merged(tuple(rule.source_patterns)))
                entry.keys.setdefault(pattern, []).append(key)
    for name, parameter in fused.items():
        one_layer = len(parameter.parts) < parameter.count
        if (whole := found.pop(name, None)) is not None:
            for expert, part in enumerate(parameter.parts):
                found[part] = Source(whole.keys, None if one_layer else expert, parameter.transposed, one_layer)
        elif name in merged and not parameter.transposed:
            lists = [merged[name].keys[pattern] for pattern in merged[name].patterns if pattern in merged[name].keys]
            if all(len(one) == parameter.count for one in lists):
                sources = list(zip(*lists, strict=True))
                if one_layer:
                    sources = [tuple(key for keys in sources for key in keys)]
                found |= {part: Source(keys) for part, keys in zip(parameter.parts, sources, strict=True)}
    return found


def _operations(rule: object) -> tuple[tuple[str, int | None], ...]:
    operations = getattr(rule, "operations", [])
    return tuple((type(operation).__name__, getattr(operation, "dim", None)) for operation in operations)
