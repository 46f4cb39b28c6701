"""A twin of a Llama model whose weights lie on no grid: the same function, in rotated coordinates.

    python benchmarks/off_grid.py OUTPUT                 # of the demo model
    ara decompose OUTPUT ...

The demo model was stored in 4 bits (Q4_1), so its weights lie on a grid, and rounding them to 4 bits with zero points
in blocks of 32 costs nothing. That is no statement about 4 bits. The twin has a rotated residual stream: with a random
orthogonal matrix Q (d, d) and the weights of the norms folded into the layers behind them,

    embedding E Q,    layers that read the stream W Q,    layers that write to it Qᵀ W,    head H Q

RMSNorm without weights does not see a rotation, so all logits are the same. They are compared on real text.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ara.data.texts import load_documents
from ara.data.tokens import evaluation_windows
from ara.models.context import context_length
from ara.models.silence import silence_transformers
from ara.models.sources import resolve
from ara_cli.console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Largest allowed difference of a logit.
ALLOWED = 1e-4
# Tokens of a window on which the models are compared.
CHECKED = 512
_READS, _WRITES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


@torch.no_grad()
def rotate(model: PreTrainedModel, seed: int = 0) -> None:
    """Rotate the residual stream of a float32 Llama model in place; afterwards the head is not tied."""
    size = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head is not None
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    _read(head, model.model.norm, q)
    embedding.weight.copy_(embedding.weight.double() @ q)
    for block in model.model.layers:
        for norm, part in ((block.input_layernorm, block.self_attn), (block.post_attention_layernorm, block.mlp)):
            for name, layer in part.named_children():
                if name in _READS:
                    _read(layer, norm, q)
                elif name in _WRITES:
                    layer.weight.copy_(q.T @ layer.weight.double())
                    if layer.bias is not None:
                        layer.bias.copy_(layer.bias.double() @ q)
            norm.weight.fill_(1)
    model.model.norm.weight.fill_(1)


def _read(layer: Any, norm: Any, q: torch.Tensor) -> None:
    """Fold the weight of a norm into a layer behind it, and let the layer read rotated inputs."""
    layer.weight.copy_((layer.weight.double() * norm.weight.double()) @ q)


@torch.inference_mode()
def largest_difference(ids: torch.Tensor, *models: PreTrainedModel) -> float:
    """Return the largest difference between the logits of two models on ids (b, t)."""
    first, second = (model(input_ids=ids, use_cache=False).logits for model in models)
    return float((first - second).abs().max())


def write_twin(name: str, output: Path, seed: int, console: Console) -> None:
    """Write the twin of a model, after comparing both.

    Args:
        name: of a Llama model.
        output: folder to write; it appears when it is complete.
        seed: of the rotation.
        console: for progress.

    Raises:
        SystemExit: the twin does not compute the same.
    """
    source = resolve(name, report=console)
    tokenizer = source.load_tokenizer()
    model, twin = (source.load_model(torch.float32, "cpu").eval() for _ in range(2))
    rotate(twin, seed)
    documents = load_documents("python-docs", "evaluation")
    length = min(CHECKED, context_length(model.config) or CHECKED)
    ids = evaluation_windows(documents, tokenizer, seq_len=length, max_windows=2).ids
    found = largest_difference(ids, model, twin)
    console.fact(f"largest difference of a logit on {ids.numel()} tokens: {found:.1e}, allowed {ALLOWED:g}")
    if not found <= ALLOWED:
        sys.exit("error: the twin does not compute the same")
    if hasattr(twin.config, "quantization_config"):
        del twin.config.quantization_config
    aside = output.with_name(f"{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    with silence_transformers():
        twin.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    aside.rename(output)
    console.fact(f"written: {output}")


def main() -> None:
    """Write the twin of the model that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--model", default="demo", help="a Llama model")
    parser.add_argument("--seed", type=int, default=0, help="of the rotation")
    arguments = parser.parse_args()
    if arguments.output.exists():
        sys.exit(f"error: {arguments.output} exists already\nhint: choose another folder")
    write_twin(arguments.model, arguments.output, arguments.seed, Console())


if __name__ == "__main__":
    main()
