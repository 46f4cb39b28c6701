"""Logits in chunks: the same losses and gradients as with all logits at once, and no tensor as large as these."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ara.models import scores as module
from ara.models.likelihood import scores_nll, window_nll
from ara.models.losses import drawn_targets, losses_at, token_losses
from ara.models.scores import Head, Place, Whole
from tests.tiny import FAMILIES, gemma_with_shared_keys, tiny_model

IDS = torch.randint(4, 250, (3, 14), generator=torch.Generator().manual_seed(0))


def _soft_capped() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "gemma2",
        vocab_size=260,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
        final_logit_softcapping=1.5,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def _model(name: str) -> PreTrainedModel:
    return _soft_capped() if name == "gemma2" else tiny_model(name)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of five positions of the tiny vocabularies."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 4 * 260)


def _cross_entropy(logits: torch.Tensor, place: Place) -> torch.Tensor:
    return losses_at(logits, place.of(IDS[:, 1:]))


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
@pytest.mark.usefixtures("small_chunks")
def test_losses_and_gradients_are_those_of_all_logits(family: str) -> None:
    model = _model(family)
    head = model.get_output_embeddings()
    head.requires_grad_(False)
    weights = torch.rand(3, 13, generator=torch.Generator().manual_seed(1))
    expected = token_losses(model(input_ids=IDS, use_cache=False).logits, IDS)
    (expected * weights).sum().backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad(set_to_none=True)
    scores = Head(model).scores(IDS)
    assert len(scores.places()) == 9
    losses = scores.losses(_cross_entropy)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    (losses * weights).sum().backward()
    assert len(gradients) > 10
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
@pytest.mark.usefixtures("small_chunks")
def test_likelihoods_and_divergences_are_those_of_all_logits(family: str) -> None:
    model, other = _model(family), _model(family)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.02)
        logits, theirs = (one(input_ids=IDS, use_cache=False).logits for one in (model, other))
        scores, teacher = Head(model).scores(IDS), Head(other).scores(IDS)
        torch.testing.assert_close(scores_nll(scores, IDS), window_nll(logits, IDS))

        def divergence(reference: Any, logits: torch.Tensor, place: Place) -> torch.Tensor:
            return losses_at(logits, place.of(IDS[:, 1:]), reference.at(place))

        expected = token_losses(logits, IDS, theirs)
        for reference in (teacher, Whole(theirs), teacher.kept(10**6)):
            torch.testing.assert_close(scores.losses(partial(divergence, reference)), expected, rtol=1e-3, atol=1e-6)
        kept = teacher.kept(10**6)
        assert isinstance(kept, Whole) and teacher.kept(100) is teacher
        torch.testing.assert_close(kept.logits[:, :-1], theirs[:, :-1])


@pytest.mark.usefixtures("small_chunks")
def test_targets_are_drawn_with_the_same_numbers() -> None:
    model = tiny_model("llama")
    numbers = torch.rand(3, 13, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = drawn_targets(model(input_ids=IDS, use_cache=False).logits, numbers)
        parts = [(drawn_targets(one, place.of(numbers)), place) for one, place in Head(model).scores(IDS).chunks()]
    assert len(parts) == 9 and whole.unique().numel() > 20
    for found, place in parts:
        assert torch.equal(found, place.of(whole))


@pytest.mark.usefixtures("small_chunks")
def test_chunks_do_not_depend_on_the_batch() -> None:
    head = Head(tiny_model("llama"))
    with torch.no_grad():
        together, alone = head.scores(IDS), head.scores(IDS[1:2])
        assert [place.positions for place in together.places()] == 3 * [place.positions for place in alone.places()]
        assert torch.equal(together.losses(_cross_entropy)[1], token_losses_of(alone, IDS[1:2])[0])


def token_losses_of(scores: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of every predicted token."""
    found: torch.Tensor = scores.losses(lambda logits, place: losses_at(logits, place.of(ids[:, 1:])))
    return found


class _Largest(TorchDispatchMode):
    """Remembers the most rows of logits in one tensor."""

    def __init__(self, head: torch.Tensor) -> None:
        super().__init__()
        self.rows, self._head = 0, head

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor) and one.dim() > 1 and one.shape[-1] == len(self._head):
                # The matrix of the head is no row of logits.
                own = one.untyped_storage().data_ptr() == self._head.untyped_storage().data_ptr()
                self.rows = max(self.rows, 0 if own else one.numel() // len(self._head))
        return result


@pytest.mark.usefixtures("small_chunks")
def test_no_tensor_is_as_large_as_the_logits() -> None:
    model = _soft_capped()
    model.requires_grad_(False)
    matrix = model.get_output_embeddings().weight
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with _Largest(matrix) as largest:
        model(input_ids=IDS, use_cache=False)
    assert largest.rows == 3 * 14
    head = Head(model)
    hook = model.get_input_embeddings().register_forward_hook(
        lambda embedding, args, output: embedded if output.shape == embedded.shape else output
    )
    head.prepare(IDS)
    with hook, _Largest(matrix) as largest:
        head.scores(IDS).losses(_cross_entropy).sum().backward()
    assert embedded.grad is not None and bool(embedded.grad.any())
    assert 1 < largest.rows <= 5


def test_small_logits_are_made_at_once() -> None:
    model, calls = tiny_model("llama"), []
    with model.get_output_embeddings().register_forward_hook(lambda *args: calls.append(1)):
        scores = Head(model).scores(IDS)
    assert isinstance(scores, Whole) and calls == [1]
    assert scores.places() == [Place(slice(0, 3), slice(0, 13))]


@pytest.mark.usefixtures("small_chunks")
def test_a_head_that_is_trained_gets_its_gradient() -> None:
    model = tiny_model("llama")
    assert isinstance(Head(model).scores(IDS), Whole)
    model.get_output_embeddings().requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    assert not isinstance(Head(model).scores(IDS), Whole)


class _Summing(nn.Module):
    """A head that reads all positions."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(x.cumsum(1))
        return logits


@pytest.mark.usefixtures("small_chunks")
def test_a_head_that_reads_other_positions_is_noticed() -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.lm_head = _Summing(model.lm_head)
    scores = Head(model).scores(IDS)
    assert isinstance(scores, Whole)
    assert torch.equal(scores.logits, model(input_ids=IDS, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
@pytest.mark.usefixtures("small_chunks")
def test_families_whose_blocks_share_values(kind: str) -> None:
    model = gemma_with_shared_keys(kind).requires_grad_(False)
    scores = Head(model).scores(IDS % 40)
    assert not isinstance(scores, Whole)
    torch.testing.assert_close(
        scores_nll(scores, IDS % 40), window_nll(model(input_ids=IDS % 40, use_cache=False).logits, IDS % 40)
    )


@pytest.mark.usefixtures("small_chunks")
def test_the_look_happens_once_and_before_hooks() -> None:
    model = tiny_model("llama").requires_grad_(False)
    head, seen = Head(model), []
    head.prepare(IDS)
    with model.get_input_embeddings().register_forward_hook(lambda embedding, args, output: seen.append(args[0])):
        head.scores(IDS)
        head.scores(IDS)
    assert [one.shape for one in seen] == [IDS.shape, IDS.shape]
