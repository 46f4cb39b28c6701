"""Compressed checkpoints: factors into a model, a model onto the disk, and back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ara.config import Layout
from ara.errors import ModelError, first_line
from ara.jsonfile import read_object
from ara.models import modeling_ara
from ara.models.linears import bias_of
from ara.models.modeling_ara import (
    FORMATS,
    QUANT_METHOD,
    AraConfig,
    AraQuantizer,
    CompressedLinear,
    Conv1D,
    LowRankLinear,
    PivotedLinear,
    densify,
    replace_linear,
)
from ara.models.pivoting import pivot
from ara.models.placement import choose_placement, torch_dtype
from ara.models.quiet import quiet_transformers
from ara.progress import SILENT, Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
    """
    with report.bar("Pivoting layers", len(ranks)) if layout == "pivoted" else nullcontext() as bar:
        for path in dict.fromkeys(files[name] for name in ranks):
            with safe_open(path, "pt") as file:
                for name in (name for name in ranks if files[name] == path):
                    a = file.get_slice(f"{name}.A")[: ranks[name]]
                    b = file.get_slice(f"{name}.B")[:, : ranks[name]]
                    replace_linear(model, name, _low_rank(model, model.get_submodule(name), a, b, layout))
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
    with quiet_transformers():
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
    from transformers import AutoModelForCausalLM

    folder = Path(path)
    config = read_config(folder)
    stored = str(config.get("dtype") or "float32")
    placement = choose_placement(device, stored if dtype == "auto" else dtype)
    try:
        with quiet_transformers():
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch_dtype(placement.dtype),
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} cannot be loaded: {first_line(error)}", "write it again: ara truncate --force"
        ) from error
    # transformers only warns of these, and fills what is missing with random numbers.
    wrong = [f"{key} is missing" for key in sorted(found["missing_keys"])]
    wrong += [f"{key} has no place in the model" for key in sorted(found["unexpected_keys"])]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ModelError(
            f"{folder} cannot be loaded: {', '.join(wrong[:3])}{more}", "write it again: ara truncate --force"
        )
    return model.to(placement.device).eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder, or of an exported one.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # transformers' and tokenizers' errors share no base class
        raise ModelError(
            f"the tokenizer of {folder} cannot be loaded: {first_line(error)}",
            "the folder must hold the model's tokenizer; write it again: ara truncate --force",
        ) from error


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
    return read_object(path, "write it again: ara truncate --force")


def is_compressed(folder: Path) -> bool:
    """Tell whether ``folder`` is a checkpoint with low-rank layers."""
    quantization = read_config(folder).get("quantization_config") or {}
    return quantization.get("quant_method") == QUANT_METHOD


def checkpoint_bytes(folder: Path) -> int:
    """Return the bytes of the weight files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def low_rank_layers(model: torch.nn.Module) -> dict[str, int]:
    """Return module path → rank of the low-rank layers of a model."""
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
