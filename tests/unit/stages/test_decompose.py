"""How often the blocks of a model run when the second moments of all layers do not fit into memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ara.config import DecomposeConfig
from ara.models.sources import ModelSource
from ara.models.weights import find_blocks
from ara.stages.common import Run
from ara.stages.decompose import decompose

# Looks at a few tokens, for layers that are not called, and at one window, for layers with the same input.
_LOOKS = 2
# One window with and one without reading all blocks in one pass, for chunks alone; see independent_starts.
_LOOKS_AT_CHUNKS = 2
_BATCHES = 8  # of the 16 windows of tiny_settings
_BACKWARD = 4  # half of them


@pytest.mark.parametrize(("method", "backward"), [("whitened", 0), ("two-sided", _BACKWARD)])
def test_text_is_read_once_however_many_chunks_there_are(
    method: str, backward: int, tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: Counter[int] = Counter()
    load = ModelSource.load_model

    def load_counted(self: ModelSource, *args: Any) -> Any:
        model = load(self, *args)
        for index, block in enumerate(find_blocks(model)[1]):
            block.mlp.down_proj.register_forward_pre_hook(lambda *_, index=index: runs.update([index]))
        return model

    monkeypatch.setattr(ModelSource, "load_model", load_counted)
    settings = {**tiny_settings, "method": method, "batch_size": 2}
    whole = decompose(DecomposeConfig(**settings), Run(tmp_path / "whole"))
    # The first block also shows how much memory the activations of a backward pass take.
    measured = {0: 1 if backward else 0}
    assert runs == Counter(dict.fromkeys(range(3), _LOOKS + _BATCHES + backward)) + Counter(measured)
    runs.clear()
    chunks = decompose(DecomposeConfig(**settings, moment_memory=1e-6), Run(tmp_path / "chunks"))
    once = _LOOKS + _LOOKS_AT_CHUNKS + _BATCHES + backward
    assert runs[0] == once + measured[0]
    # A later block also runs when a start at its own chunk is tried out, and when its backward pass is recomputed.
    assert runs[1] == runs[2] == once + 1 + backward
    assert whole.manifest is not None and chunks.manifest is not None
    assert whole.manifest.files == chunks.manifest.files
