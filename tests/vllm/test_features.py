"""What vLLM does with ordinary layers, it does with compressed ones: adapters, prefix caching, chunked prefill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ara.layouts.modeling_ara import densify
from tests.vllm.greedy import PROMPTS, answers, by_transformers, by_vllm, engine

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
pytestmark = pytest.mark.timeout(900)
Folder = Callable[..., Path]
# Of q, k and v, and of gate and up, which vLLM computes together, one has no adapter.
TARGETS = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]


def make_adapter(source: Path, folder: Path) -> Path:
    """Write an adapter of PEFT, with random numbers that change the tokens."""
    import peft

    import ara

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(densify(ara.load(source, "cpu", "float32")), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "layout", "processes"),
    [("llama", "pivoted", 1), ("qwen2", "factors", 1), ("llama", "factors", 2)],
)
def test_an_adapter(folder: Folder, family: str, layout: str, processes: int, tmp_path: Path) -> None:
    source = folder(family, layout)
    adapter = make_adapter(source, tmp_path / "adapter")
    expected = by_transformers(source, adapter=adapter)
    assert expected != by_transformers(source)
    assert by_vllm(source, adapter=adapter, tensor_parallel_size=processes) == expected


def test_an_adapter_on_the_factors_is_refused(folder: Folder, tmp_path: Path) -> None:
    """As `ara recover --train lora --keep-adapter` writes it: vLLM has no layers of their names."""
    import peft

    import ara

    source = folder("llama", "factors")
    parts = ["q_proj.A", "q_proj.B"]
    config = peft.LoraConfig(r=4, target_modules=parts, task_type="CAUSAL_LM")
    peft.get_peft_model(ara.load(source, "cpu", "float32"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"received .*q_proj\.A"):
        by_vllm(source, adapter=tmp_path / "adapter")


def test_cached_prefixes(folder: Folder) -> None:
    source = folder("llama", "pivoted")
    start = [1, *range(50, 115)]
    first, second = [*start, 7], [*start, 8, 9]
    with engine(source, enable_prefix_caching=True, block_size=32) as model:
        (before,), (after,) = answers(model, [first]), answers(model, [second])
    assert before.num_cached_tokens == 0
    assert after.num_cached_tokens == 64
    found = [list(one.outputs[0].token_ids) for one in (before, after)]
    assert found == by_transformers(source, prompts=[first, second])


def test_prompts_in_pieces(folder: Folder) -> None:
    """The longest prompt has more tokens than a pass may have, so vLLM must read it in pieces."""
    source = folder("llama", "pivoted")
    tokens = 16
    assert tokens < max(map(len, PROMPTS))
    found = by_vllm(source, enable_chunked_prefill=True, max_num_batched_tokens=tokens)
    assert found == by_transformers(source)
