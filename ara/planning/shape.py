"""The shape of a model: its parameters, its layers, and what one pass over a window takes.

The pass is the model's own forward pass, on fake tensors of torch: they have shapes and dtypes, and no numbers. So
every family is counted by its own code, in seconds, whatever its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ara.calibration.moments import watching_inputs
from ara.errors import UnsupportedModelError, first_line
from ara.layout_names import DEFAULT_LAYOUT, LayoutName
from ara.models.accounting import parameter_count
from ara.models.multimodal import kept_parts
from ara.models.recompute import distinct_bytes, keeping_graph
from ara.models.sources import ModelSource
from ara.models.weights import LinearSpec, find_blocks, find_linears
from ara.planning.experts import first_expert_for_all
from ara.planning.work import Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class WindowPass:
    """What a forward pass over one window takes.

    Attributes:
        tokens: of the window, t.
        products: FLOPs of the matrix products in the decoder blocks.
        attention: FLOPs of causal attention, which grow with t².
        head: FLOPs of the head.
        moved: bytes that all other operations read and write.
        kept: bytes that are kept for a backward pass to the embeddings, without the logits.
    """

    tokens: int
    products: int
    attention: int
    head: int
    moved: int
    kept: int

    def forward(self, windows: float, tokens: int | None = None, *, head: bool = True) -> Work:
        """Return the work of forward passes.

        Args:
            windows: their number.
            tokens: per window; those of this pass by default.
            head: whether the head runs.
        """
        scale = (tokens or self.tokens) / self.tokens
        products, attention = scale * (self.products + (self.head if head else 0)), scale**2 * self.attention
        return Work(products=products, attention=attention, moved=scale * self.moved) * windows

    def backward(self, windows: float, *, head: bool = True) -> Work:
        """Return the work of backward passes to the embeddings, without gradients of weights.

        A product needs one product for the gradient of its input, attention two and a half times its own FLOPs, and
        every other operation reads what was kept and writes as much again.

        Args:
            windows: their number.
            head: whether the passes begin behind the head.
        """
        products = self.products + (self.head if head else 0)
        return Work(products=products, attention=2.5 * self.attention, moved=2 * self.moved) * windows


@dataclass(frozen=True)
class ModelShape:
    """A model without numbers.

    Attributes:
        specs: the layers that are factorised, with the bits of ``stored``.
        owners: layer → the first layer of the model with the same input.
        shares: path of a list with one layer of all experts, or of such a layer → the share of the tokens that an
            expert sees on average.
        parameters: of the model; a tied weight counts once.
        embeddings: parameters of the embedding and the head; a tied pair counts once.
        block: parameters of the largest decoder block.
        blocks: their number.
        tensors: name → shape of every stored tensor.
        hidden: width of the residual stream.
        vocabulary: rows of the head.
        dtype: of the run.
        stored: dtype of factors and checkpoints.
        window: one pass.
        kept: path → parameters of the parts outside the language model, such as a vision tower.
    """

    specs: tuple[LinearSpec, ...]
    owners: Mapping[str, str]
    shares: Mapping[str, float]
    parameters: int
    embeddings: int
    block: int
    blocks: int
    tensors: Mapping[str, tuple[int, ...]]
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    stored: torch.dtype
    window: WindowPass
    kept: Mapping[str, int] = field(default_factory=dict)

    @property
    def linear(self) -> int:
        """Parameters of the factorised layers."""
        return sum(spec.dense_cost for spec in self.specs)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in the run's dtype."""
        return self.parameters * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of the largest block, beside which embedding and head must be in memory, in the run's dtype."""
        return (self.block + self.embeddings) * self.dtype.itemsize

    def share(self, spec: LinearSpec) -> float:
        """Return the share of its weights that a token multiplies with, 1 if it is no expert's."""
        of_experts = spec.pool is not None or spec.experts > 1
        return self.shares[spec.pool or spec.name] if of_experts else 1.0

    def seen(self, spec: LinearSpec) -> float:
        """Return the share of the tokens whose inputs a layer gets; a layer of all experts gets all of them."""
        return 1.0 if spec.experts > 1 else self.share(spec)

    @property
    def leaders(self) -> tuple[LinearSpec, ...]:
        """The first layer of each group with the same input."""
        return tuple(spec for spec in self.specs if self.owners[spec.name] == spec.name)


def read_shape(
    source: ModelSource,
    dtype: torch.dtype,
    seq_len: int,
    exclude: Sequence[str] = (),
    layout: LayoutName = DEFAULT_LAYOUT,
    stored: torch.dtype | None = None,
) -> ModelShape:
    """Return the shape of a model; no weight is read.

    Args:
        source: the model.
        dtype: of the run.
        seq_len: tokens of the window.
        exclude: shell patterns of layers that are not factorised.
        layout: how low-rank layers are stored.
        stored: dtype of factors and checkpoints; ``dtype`` by default.

    Raises:
        UnsupportedModelError: no layer can be factorised, or a pass depends on numbers.
        UsageError: a pattern matches nothing.
    """
    model = source.empty_model().to(dtype).eval().requires_grad_(False)
    linears = find_linears(model, exclude)
    ends = {module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module}
    blocks = find_blocks(model)[1]
    counts: dict[str, Any] = {
        "parameters": parameter_count(model),
        "embeddings": sum(weight.numel() for weight in ends),
        "block": max(parameter_count(block) for block in blocks),
        "blocks": len(blocks),
        "tensors": _stored(model),
        "kept": kept_parts(model),
        "hidden": model.get_input_embeddings().weight.shape[1],
        "vocabulary": model.get_output_embeddings().weight.shape[0],
    }
    window, owners, shares = trace(model, linears, seq_len, source.identity.requested)
    stored = stored or dtype
    called = tuple(replace(spec, layout=layout, bits=8 * stored.itemsize) for spec in linears if spec.name in owners)
    if not called:
        raise UnsupportedModelError(
            f"{type(model).__name__} calls none of its {len(linears)} linear layers in a forward pass",
            "ARA can only factorise layers whose modules are called",
        )
    return ModelShape(called, owners, shares, dtype=dtype, stored=stored, window=window, **counts)


class Trace(NamedTuple):
    """What a pass shows: its work, and :attr:`ModelShape.owners` and :attr:`ModelShape.shares`."""

    window: WindowPass
    owners: dict[str, str]
    shares: dict[str, float]


def trace(model: PreTrainedModel, linears: Sequence[LinearSpec], seq_len: int, name: str) -> Trace:
    """Return what a pass over one window takes, and which layers share an input.

    Args:
        model: on the meta device; its parameters become fake tensors.
        linears: its layers.
        seq_len: tokens of the window.
        name: of the model, for the error.

    Raises:
        UnsupportedModelError: the model's code looks at numbers, of which there are none.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    counter = _Counter()
    at_head: list[tuple[int, int]] = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        # The graph begins at the embeddings, as it does in a run: the weights themselves need no gradient.
        model.get_input_embeddings().weight.requires_grad_(True)
        ids = torch.zeros(1, seq_len, dtype=torch.int64)
        handle = model.get_output_embeddings().register_forward_pre_hook(
            lambda module, args: at_head.append((counter.products, counter.moved))
        )
        try:
            with (
                watching_inputs(model, linears) as owners,
                first_expert_for_all(model) as shares,
                torch.enable_grad(),
                keeping_graph() as saved,
                _whole(),
                counter,
            ):
                logits = model(input_ids=ids, use_cache=False).logits
            kept = distinct_bytes([one for one in saved if one.shape[-1:] != logits.shape[-1:]], model)
        except Exception as error:
            raise UnsupportedModelError(
                f"the work of {name} cannot be counted: its forward pass needs numbers "
                f"({type(error).__name__}: {first_line(error)[:200]})",
                "ara decompose may work all the same",
            ) from error
        finally:
            handle.remove()
    before = at_head[0][0] if at_head else counter.products
    window = WindowPass(seq_len, before, counter.attention, counter.products - before, counter.moved, kept)
    owners |= {spec.name: spec.name for spec in linears if spec.pool in shares}
    return Trace(window, owners, shares)


@contextmanager
def _whole() -> Iterator[None]:
    """Tell transformers that a window is one sequence, which it would otherwise look up in the numbers of positions.

    Where it cannot look, it makes a mask, and attention with a mask repeats keys and values of grouped heads.
    """
    from transformers import masking_utils

    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


class _Counter(TorchDispatchMode):
    """Counts the FLOPs of products and of attention, and the bytes that other operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attention = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if "scaled_dot_product" in packet.__name__:
            query, key = args[0], args[1]
            # q kᵀ and its product with v, of which causal attention computes half.
            self.attention += 2 * query.numel() * key.shape[-2]
        elif packet in flop_registry:
            self.products += flop_registry[packet](*args, **kwargs, out_val=out)
        elif not func.is_view:
            self.moved += sum(_bytes(value) for value in (*args, *kwargs.values(), out))
        return out


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0


def _stored(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return name → shape of the tensors that a checkpoint of the dense model holds."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *buffers.items())}
