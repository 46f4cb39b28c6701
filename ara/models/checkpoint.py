"""Compressed checkpoints: factors into a model, a model onto the disk, and back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from ara.config import Layout
from ara.errors import ModelError, NumericalError, first_line, is_out_of_memory
from ara.jsonfile import read_object
from ara.layouts import modeling_ara
from ara.layouts.modeling_ara import (
    FORMATS,
    QUANT_METHOD,
    AraConfig,
    AraQuantizer,
    CompressedLinear,
    Conv1D,
    LowRankLinear,
    PivotedLinear,
    densify,
)
from ara.layouts.pivoting import pivot
from ara.models.completeness import check_loaded, stored_tensors, weight_files
from ara.models.loading import why_not_loaded
from ara.models.placement import choose_placement, torch_dtype
from ara.models.silence import silence_transformers
from ara.models.tokenizer_check import check_tokenizer
from ara.models.weights import WeightRef, bias_of
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_AGAIN = "write it again: ara truncate --force"
# The file of code that makes a checkpoint load without ara installed.
CODE_FILE = "modeling_ara.py"


def apply_factors(
    model: PreTrainedModel,
    ranks: Mapping[str, int],
    files: Mapping[str, Path],
    layout: Layout = "factors",
    report: Reporter = SILENT,
) -> None:
    """Replace linear layers of ``model`` by low-rank ones, in place.

    Args:
        model: dense; its biases are kept.
        ranks: module path → kept rank k.
        files: module path → safetensors file with its full factors ``<path>.A`` (r, n) and ``<path>.B`` (m, r); only
            the kept components are read.
        layout: how the new layers hold the product.
        report: progress of pivoting, which takes a while.

    Raises:
        NumericalError: factors become infinite in the dtype of the model.
    """
    with report.bar("Pivoting layers", len(ranks)) if layout == "pivoted" else nullcontext() as bar:
        for path in dict.fromkeys(files[name] for name in ranks):
            with safe_open(path, "pt") as file:
                for name in (name for name in ranks if files[name] == path):
                    a = file.get_slice(f"{name}.A")[: ranks[name]]
                    b = file.get_slice(f"{name}.B")[:, : ranks[name]]
                    ref = WeightRef.named(name)
                    layer = _low_rank(model, ref.owner(model), a, b, layout)
                    if not all(bool(parameter.isfinite().all()) for parameter in layer.parameters()):
                        raise NumericalError(
                            f"the factors of {name} exceed the range of {str(model.dtype).removeprefix('torch.')}",
                            "use --dtype bfloat16 or --dtype float32",
                        )
                    ref.replace(model, layer)
                    if bar is not None:
                        bar.advance()


def _low_rank(
    model: PreTrainedModel, module: torch.nn.Module, a: torch.Tensor, b: torch.Tensor, layout: Layout
) -> CompressedLinear:
    """Return what takes the place of ``module``: the product of ``b`` (m, k) and ``a`` (k, n), and its bias."""
    bias, transposed = bias_of(module), isinstance(module, Conv1D)

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(model.dtype).to(model.device).contiguous()

    if layout == "factors":
        return LowRankLinear.from_factors(placed(a), placed(b), bias, transposed)
    # Apple's GPUs have no float64.
    worker = "cpu" if model.device.type == "mps" else model.device
    parts = pivot(a.to(worker), b.to(worker))
    return PivotedLinear.from_parts(placed(parts.a), placed(parts.c), parts.order.to(model.device), bias, transposed)


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    ranks: Mapping[str, int],
    provenance: dict[str, Any],
    layout: Layout = "factors",
    dense: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Write a checkpoint that plain ``from_pretrained`` reads.

    Args:
        model: with its low-rank layers in place; multiplied back in place when ``dense``.
        tokenizer: saved beside it.
        folder: created if need be.
        ranks: module path → kept rank of the low-rank layers.
        provenance: carried in ``config.json``.
        layout: of the low-rank layers.
        dense: write an ordinary dense checkpoint.
        max_shard_size: largest file, such as ``5GB``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if dense:
        densify(model)
    elif ranks:
        config = AraConfig(dict(ranks), FORMATS[layout], provenance, layout)
        model.config.quantization_config = config
        model.config.auto_map = {"AutoModelForCausalLM": f"{Path(CODE_FILE).stem}.AraForCausalLM"}
        model.hf_quantizer = AraQuantizer(config)
        assert modeling_ara.__file__ is not None
        shutil.copyfile(modeling_ara.__file__, folder / CODE_FILE)
    with silence_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
    # safetensors creates its files readable by their owner alone; a checkpoint is as shareable as its config.
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def load(path: str | Path, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """Load a compressed checkpoint, in evaluation mode.

    Args:
        path: folder that ``ara truncate`` wrote (the ``checkpoint`` folder), or a densified one.
        device: auto, cpu, cuda, cuda:N or mps.
        dtype: float32, bfloat16 or float16; auto takes the dtype of the checkpoint.

    Raises:
        ModelError: not a checkpoint, or one that is damaged.
        UsageError: unknown device or dtype.
    """
    folder = Path(path)
    stored = str(read_config(folder).get("dtype") or "float32")
    placement = choose_placement(device, stored if dtype == "auto" else dtype)
    model = _read(folder, torch_dtype(placement.dtype))
    return model.to(placement.device).eval().requires_grad_(False)


def check_loads(folder: Path) -> None:
    """See that a checkpoint loads: the whole way of ``from_pretrained``, on torch's device without memory.

    Raises:
        ModelError: it does not, or the model is not the one in the files.
    """
    try:
        _read(folder, None, "meta")
    except ModelError as error:
        raise ModelError(
            f"what was written does not load again, and is thrown away: {error}",
            "low-rank layers do not fit this family: ara truncate --densify writes an ordinary checkpoint",
        ) from error


def _read(folder: Path, dtype: torch.dtype | None, device: str | None = None) -> PreTrainedModel:
    """Load a checkpoint and compare it with its files; ``dtype`` ``None`` takes the one that is stored."""
    from transformers import AutoModelForCausalLM

    try:
        with silence_transformers():
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype="auto" if dtype is None else dtype,
                device_map=device,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, with the shapes
            )
    except MemoryError:
        raise
    except Exception as error:  # whatever a model's own code raises
        if is_out_of_memory(error):
            raise
        reason, _hint = why_not_loaded(error)
        raise ModelError(f"{folder} cannot be loaded: {reason}", _AGAIN) from error
    check_loaded(model, loading, f"{folder} cannot be loaded: it", stored_tensors(weight_files(folder)), _AGAIN)
    loaded: PreTrainedModel = model
    return loaded


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder, or of an exported one.

    Raises:
        ModelError: there is none, it is damaged, or it cannot be used.
    """
    from transformers import AutoTokenizer

    try:
        with silence_transformers():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            check_tokenizer(tokenizer)
    except MemoryError:
        raise
    except Exception as error:  # transformers' and tokenizers' errors share no base class
        raise ModelError(
            f"the tokenizer of {folder} cannot be loaded: {first_line(error)}",
            "the folder must hold the model's tokenizer; write it again: ara truncate --force",
        ) from error
    return tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a checkpoint folder.

    Raises:
        ModelError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} is not a checkpoint folder (no config.json)", "ara truncate writes one: .../checkpoint"
        )
    return read_object(path, _AGAIN)


def quantization_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``quantization_config`` of a checkpoint, empty where it has none.

    Raises:
        ModelError: it is not an object.
    """
    found = config.get("quantization_config") or {}
    if not isinstance(found, dict):
        raise ModelError(
            f"{folder}/config.json: quantization_config is a {type(found).__name__}, expected an object", _AGAIN
        )
    return found


def is_compressed(folder: Path) -> bool:
    """Tell whether ``folder`` is a checkpoint with low-rank layers."""
    return quantization_of(folder, read_config(folder)).get("quant_method") == QUANT_METHOD


def checkpoint_bytes(folder: Path) -> int:
    """Return the bytes of the weight files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def low_rank_layers(model: torch.nn.Module) -> dict[str, int]:
    """Return module path → rank of the low-rank layers of a model."""
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
