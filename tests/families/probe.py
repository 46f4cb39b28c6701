"""Takes a tiny random model of one architecture through the pipeline, and says what came out of it."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ara.artifacts.factors import factor_files, specs_of
from ara.config import AllocateConfig, DecomposeConfig, TruncateConfig
from ara.errors import AraError, UnsupportedModelError, first_line
from ara.models.checkpoint import load
from ara.models.cutting import save_cut
from ara.models.families import Family, Table
from ara.models.low_rank import apply_factors, low_rank_layers
from ara.models.multimodal import kept_parts, language_modules
from ara.models.silence import silence_transformers
from ara.models.sources import ModelSource, resolve
from ara.models.weights import LinearSpec
from ara.stages.allocate import allocate
from ara.stages.common import Run
from ara.stages.decompose import decompose
from ara.stages.truncate import truncate
from ara.workspace.view import StageView
from tests.families.configs import NotBuilt, default_config, tiny_config
from tests.tiny import VOCABULARY, random_model, tiny_texts, tiny_tokenizer

_PLACE = {"device": "cpu", "dtype": "float32"}
# Longer than the windows of tiny configs, so that their masks matter.
_WINDOW = 24
_KEEP = 0.7
# Largest differences of logits, as a share of the largest logit: at full rank, and of the same numbers.
_TOLERANCE, _ROUNDING = 2e-4, 1e-6


class Wrong(Exception):
    """What came out of the pipeline is not what it should be."""


def architectures(table: Table) -> dict[str, str]:
    """Return model type → class of one table of families, in the order of the names."""
    language = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    multimodal = dict(modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    found = multimodal if table == "multimodal" else {kind: language[kind] for kind in language.keys() - multimodal}
    return dict(sorted(found.items()))


def probe(kind: str, architecture: str, folder: Path, values: Mapping[str, Any] | None = None) -> Family:
    """Take one model type through the pipeline, inside an empty folder.

    Args:
        kind: model type.
        architecture: class of its models.
        folder: for the model and the workspace.
        values: of fields of its config, instead of those of the table.
    """

    def family(outcome: Any, reason: str) -> Family:
        return Family(kind, architecture, outcome, reason=" ".join(reason.split()))

    model_folder, workspace = folder / kind, folder / "workspace"
    try:
        # A family that is refused by its config needs no model.
        if why := _refusal(default_config(kind), model_folder):
            return family("refused", why)
        _make(tiny_config(kind, values), model_folder)
        return Family(kind, architecture, "works", *_through(model_folder, workspace, folder))
    except NotBuilt as error:
        return family("not built", str(error))
    except UnsupportedModelError as error:
        if left := sorted(str(path.relative_to(workspace)) for path in workspace.rglob("*")):
            return family("fails", f"refused, but the workspace has {', '.join(left)}")
        return family("refused", _without(str(error), model_folder))
    except Wrong as error:
        return family("fails", str(error))
    except AraError as error:
        return family("fails", f"{type(error).__name__}: {_without(str(error), model_folder)}")
    except Exception as error:
        return family("fails", f"{type(error).__name__}: {first_line(error)}")


def _refusal(config: PreTrainedConfig, folder: Path) -> str | None:
    """Write a config into a folder without weights, and return why it is refused, or ``None``."""
    config.save_pretrained(folder)
    try:
        resolve(str(folder), needs_weights=False)
    except UnsupportedModelError as error:
        # The table names model type and architecture anyway.
        return _without(str(error), folder).partition(" (model_type")[0].removeprefix("the model ")
    return None


def _make(config: PreTrainedConfig, folder: Path) -> None:
    """Write a tiny random model with its tokenizer.

    Raises:
        NotBuilt: transformers does not build, run or save one.
    """
    try:
        with silence_transformers():
            tiny_tokenizer().save_pretrained(folder)
            model = random_model(config)
            model.save_pretrained(folder)
            _run(model)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {first_line(error)}") from error


def _run(model: PreTrainedModel) -> None:
    """Run the model on text. An error that asks for another input passes: it is ARA that has to refuse the model."""
    try:
        _logits(model, torch.arange(_WINDOW)[None])
    except (TypeError, ValueError) as error:
        others = set(inspect.signature(model.forward).parameters) - {"input_ids"}
        if others.isdisjoint(re.findall(r"\w+", str(error))):
            raise


def _without(reason: str, folder: Path) -> str:
    """Return an error without the path of the model."""
    return reason.replace(str(folder), "the model")


def _through(model_folder: Path, workspace: Path, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Decompose, allocate, truncate and load; compare logits.

    Returns:
        Kinds of the factorised layers, and names of all other matrices.

    Raises:
        AraError: the model is refused, or a stage fails.
        Wrong: logits differ.
    """
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in tiny_texts(60)), encoding="utf-8")
    run, few = Run(workspace), {"samples": 2, "batch_size": 2}
    # So little memory for moments that every block is a chunk of its own.
    settings: Any = {"seq_len": _WINDOW, "moment_memory": 1e-6, **few, **_PLACE}
    factors = decompose(DecomposeConfig(model=str(model_folder), text=f"file:{text}", **settings), run)
    ranks = allocate(AllocateConfig(keep=_KEEP, held_out=1, **few, **_PLACE), run)
    written = truncate(TruncateConfig(), run)
    source, specs = resolve(str(model_folder)), specs_of(factors)
    ids = torch.randint(VOCABULARY, (2, _WINDOW), generator=torch.Generator().manual_seed(0))
    model = source.load_model(torch.float32)
    dense = _logits(model, ids)
    _check_causal(model, ids, dense)
    loaded = load(written.path / "checkpoint", "cpu")
    _check_compressed(source, loaded, dict(factor_files(factors, specs)), dense, ids)
    _check_full_rank(source, factors, specs, folder / "full", dense, ids)
    assert ranks.manifest is not None
    kinds = tuple(dict.fromkeys(_any_number(spec.kind) for spec in specs))
    return kinds, _dense_matrices(model, specs)


def _check_causal(model: PreTrainedModel, ids: torch.Tensor, dense: torch.Tensor) -> None:
    """Change the last token: the logits of all tokens before it must stay."""
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % VOCABULARY
    if (difference := _difference(_logits(model, changed)[:, :-1], dense[:, :-1])) > _TOLERANCE:
        raise Wrong(f"its predictions depend on later tokens: logits change by {difference:.1e}")


def _check_compressed(
    source: ModelSource, loaded: PreTrainedModel, files: dict[str, Path], dense: torch.Tensor, ids: torch.Tensor
) -> None:
    """Compare the checkpoint of a compressed model with the same factors put into the dense model in memory."""
    memory = source.load_model(torch.float32)
    ranks = low_rank_layers(loaded)
    if not ranks:
        raise Wrong(f"no layer is factorised at keep {_KEEP}")
    apply_factors(memory, ranks, files)
    written, made = _logits(loaded, ids), _logits(memory, ids)
    # Dense experts in memory may be transposed views, which are multiplied in another order.
    if (difference := _difference(written, made)) > _ROUNDING:
        raise Wrong(f"the loaded checkpoint differs from the model in memory, by {difference:.1e}")
    if torch.equal(written, dense):
        raise Wrong(f"the logits at keep {_KEEP} are those of the dense model: no factorised layer is used")


def _check_full_rank(
    source: ModelSource,
    factors: StageView,
    specs: list[LinearSpec],
    folder: Path,
    dense: torch.Tensor,
    ids: torch.Tensor,
) -> None:
    """Write and load the model with all its layers at full rank, and compare it with the dense model."""
    ranks = {spec.name: spec.full_rank for spec in specs}
    save_cut(
        source.stored_model(torch.float32),
        source.load_tokenizer(),
        folder,
        ranks=ranks,
        files=factor_files(factors, specs),
        provenance={},
        layout="factors",
    )
    loaded = load(folder, "cpu")
    if low_rank_layers(loaded) != ranks:
        raise Wrong("the loaded checkpoint has other low-rank layers than were written")
    if (difference := _difference(_logits(loaded, ids), dense)) > _TOLERANCE:
        raise Wrong(f"the logits at full rank differ from the dense ones, by {difference:.1e}")


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, as a share of the largest logit."""
    return float((one - other).abs().max() / other.abs().max())


def _dense_matrices(model: PreTrainedModel, specs: list[LinearSpec]) -> tuple[str, ...]:
    """Return the names of the matrices that are not factorised, without embeddings and head.

    Of a model that also reads pictures: those of its language model, and its other parts.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    embeddings |= {id(head.weight)} if head is not None else set()
    factorised, language = {f"{spec.name}.weight" for spec in specs}, language_modules(model)

    def names() -> Iterator[str]:
        for name, weight in model.named_parameters():
            inside = name.rpartition(".")[0] in language
            if inside and weight.dim() >= 2 and id(weight) not in embeddings and name not in factorised:
                yield _any_number(name.removesuffix(".weight"))
        yield from kept_parts(model)

    return tuple(dict.fromkeys(names()))


def _any_number(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)
