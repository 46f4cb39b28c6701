"""Evaluation data of the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import tiny_texts


@pytest.fixture
def benchmark_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder to work in, with evaluation data in which all texts are tiny ones."""
    texts = tiny_texts(400)
    files = {
        "c4_sample/c4_rp1.jsonl": texts[:250],
        "c4_sample/c4_rp2.jsonl": texts[250:],
        "wikitext2_raw/test.jsonl": texts[250:],
    }
    for name, found in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    folder = tmp_path / "data" / "instructions"
    folder.mkdir()
    for name, start in (("calibration", 0), ("evaluation", 60)):
        lines = [
            [{"role": "user", "content": texts[i][:60]}, {"role": "assistant", "content": texts[i + 1][:90]}]
            for i in range(start, start + 60)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
    monkeypatch.setenv("ARA_DATA_DIR", str(tmp_path / "data"))
    return tmp_path
