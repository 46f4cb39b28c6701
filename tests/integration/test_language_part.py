"""The recipe of the docs: the language model of a multimodal one, saved as a model of its own, goes through ARA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from ara.errors import UnsupportedModelError
from ara.models.sources import resolve
from ara.models.weights import find_linears
from tests.families.configs import tiny_config
from tests.tiny import save_with_tokenizer

_PAGE = Path(__file__).parents[2] / "docs" / "compressing.md"
_IDS = torch.arange(12)[None]


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "mistral3"])
def test_recipe(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(tiny_config(kind), dtype=torch.float32).eval()
    folder = save_with_tokenizer(tmp_path / "whole", whole)
    with pytest.raises(UnsupportedModelError, match="vision or audio model") as refused:
        resolve(str(folder))
    assert "docs/compressing.md#model" in str(refused.value.hint)
    code = re.search(r"```python\n(.*?language-model.*?)```", _PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code[1].replace("google/gemma-3-4b-it", str(folder)), names)
    model = resolve(str(tmp_path / "language-model")).load_model(torch.float32)
    assert {type(model)} == {type(AutoModelForCausalLM.from_config(model.config))}
    assert find_linears(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=_IDS).logits, whole(input_ids=_IDS).logits)
