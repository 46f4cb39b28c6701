"""``ara export``: from a workspace and from a folder, what it leaves, and that nothing stays behind on failure."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from ara.config import AllocateConfig, DecomposeConfig, TruncateConfig
from ara.evaluation.generation import stop_tokens
from ara.stages.common import Run
from ara.stages.run import run_pipeline
from export.onnx import architecture, writing
from export.onnx.runner import OnnxDecoder
from export.onnx.tolerance import TOLERANCES, Tolerance
from export.onnx.torch_like import TorchLike
from tests.commands import ara, done, refused
from tests.damage import flip, listing
from tests.questions import write_questions
from tests.tiny import VOCABULARY, tiny_tokenizer


@pytest.fixture(scope="module")
def finished_base(checkpoint: Callable[..., Any], tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export") / "ws"
    settings = {"text": tiny_text, "samples": 12, "seq_len": 48, "device": "cpu", "dtype": "float32"}
    run_pipeline(
        DecomposeConfig(model=str(checkpoint("llama", None).folder), **settings),
        [AllocateConfig(keep=0.7, method="energy", layout="pivoted")],
        {"truncate": TruncateConfig()},
        Run(root),
    )
    return root


@pytest.fixture
def workspace(finished_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_base, tmp_path / "ws"))


def test_a_workspace_is_exported_and_told_of(workspace: Path) -> None:
    result = done("export", "--onnx", "--execution-provider", "cpu", "-w", workspace)
    for word in ("prefill", "decode", "chunks", "padded", "100.00%", "energy-0.70-pivoted-fp32"):
        assert word in result.stdout + result.stderr
    folder = workspace / "export" / "energy-0.70-pivoted-fp32"
    assert {"model.onnx", "model.onnx.data", "ara_export.json", "genai_config.json"} <= listing(folder)
    again = ara("export", "--execution-provider", "cpu", "-w", workspace)
    assert "is there already" in again.stderr
    status = json.loads(ara("status", "--json", "-w", workspace).stdout)
    assert ("export", "done") in {(stage["stage"], stage["state"]) for stage in status["stages"]}


def test_a_folder_is_exported_without_a_workspace(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ["export", "--execution-provider", "cpu", "--output", output, "--source"]
    document = json.loads(ara(*command, checkpoint("llama").folder, "--json").stdout)
    assert document["layout"] == "factors" and len(document["parity"]["cases"]) == 4
    assert len(document["source"]["sha256"]) == 64
    before = listing(output)
    refused(ara(*command, checkpoint("llama").folder, "-q"), 1, "is not empty")
    dense = ara(*command, checkpoint("llama", None).folder, "--overwrite", "--no-parity")
    assert dense.exit_code == 0 and "is not compressed: the export is dense" in dense.stderr
    assert "was not compared" in dense.stderr
    assert listing(output) == before and json.loads((output / "ara_export.json").read_text())["ranks"] == {}
    refused(ara("export", "--output", output), 2, "--source and --output belong together")
    refused(ara("export", "--overwrite"), 2, "--overwrite is for --output")
    refused(ara(*command, output, "--name", "mine"), 2, "--name and --source are both given")


def test_int8_falls_back_to_16_bits_and_says_so(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["export", "--execution-provider", "cpu", "--precision", "int8", "--parity-tokens", 32, "-w", workspace]
    monkeypatch.setitem(TOLERANCES, "int8", Tolerance(None, 0.0, 1.0, 1.0))
    plain = done(*command, "--name", "plain", "--json")
    results = json.loads(plain.stdout)["results"]
    assert results["fallback"] is None and "products exact" not in plain.stderr
    worst = max(case["kl"] for case in results["parity"]["cases"])
    # Impossible: one line, exit code 1, and only the earlier export is there.
    with monkeypatch.context() as patch:
        patch.setitem(TOLERANCES, "int8", Tolerance(None, 0.0, -1.0, 1.0))
        refused(ara(*command, "--name", "never", "-q"), 1, "does not match the checkpoint, even with")
    assert [path.name for path in (workspace / "export").iterdir() if path.is_dir()] == ["plain"]
    monkeypatch.setitem(TOLERANCES, "int8", Tolerance(None, 0.0, worst / 2, 1.0))
    made = done(*command, "--name", "mixed")
    told = made.stdout + made.stderr
    assert "measuring what each matrix costs" in told and "products exact: " in told
    assert f"all in 8 bits: KL {worst:.2g} nats" in told
    found = json.loads((workspace / "export" / "mixed" / "manifest.json").read_text())["results"]["fallback"]
    assert 0 < len(found["matrices"]) < found["candidates"] and found["kl"] == worst
    assert f"{len(found['matrices'])} of {found['candidates']} products exact" in told
    done("report", "-w", workspace)
    (page,) = workspace.glob("report/*/report.html")
    assert f"int8 graph with {len(found['matrices'])} of {found['candidates']} products exact" in page.read_text()


def test_nothing_is_left_where_it_fails(
    workspace: Path, checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["export", "--execution-provider", "cpu", "-q"]

    def nothing_left() -> bool:
        return not listing(workspace / "export") and {path.name for path in tmp_path.iterdir()} == {"ws"}

    def wrong(self: Any, name: str) -> Any:
        return tuple(table.flip(1) for table in original(self, name))

    original = architecture.Decoder.rotary_tables
    with monkeypatch.context() as patch:
        patch.setattr(architecture.Decoder, "rotary_tables", wrong)
        patch.setattr("export.onnx.proof.check_rotary", lambda decoder, model: None)
        refused(ara(*command, "-w", workspace), 1, "the fp32 graph does not match the checkpoint")
        folder = checkpoint("llama").folder
        refused(ara(*command, "--source", folder, "--output", tmp_path / "out"), 1, "does not match the checkpoint")
    assert nothing_left()

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing.ir, "save", full)
        refused(ara(*command, "-w", workspace), 1, "the disk is full")
        refused(ara(*command, "--source", folder, "--output", tmp_path / "out"), 1, "the disk is full")
    assert nothing_left()
    refused(ara(*command, "--precision", "int4", "-w", workspace), 1, "does not round to 4 bits")
    refused(
        ara(*command, "--source", checkpoint("gptj", None).folder, "--no-parity", "--output", tmp_path / "out"),
        1,
        "does not know the family 'gptj'",
    )
    assert nothing_left()
    flip(next((workspace / "truncate").glob("*/checkpoint/model.safetensors")), -5)
    refused(ara(*command, "-w", workspace), 1, "model.safetensors")
    assert nothing_left()


def test_what_is_shipped_is_what_is_measured(workspace: Path, tiny_text: str) -> None:
    """ara eval --backend onnx and ara generate --backend onnx run the exported graph."""
    words = ["--tasks", tiny_text, "--seq-len", 64, "--max-windows", 3, "--device", "cpu", "--dtype", "float32"]
    refused(ara("eval", "--backend", "onnx", *words, "-w", workspace, "-q"), 1, "was not exported")
    assert ara("export", "--execution-provider", "cpu", "-w", workspace).exit_code == 0
    result = ara("eval", "--backend", "onnx", *words, "--prompt", "The baker", "-w", workspace, "--json")
    document = json.loads(result.stdout)["results"]
    (task,) = document["tasks"].values()
    ours, torch = "export/energy-0.70-pivoted-fp32", "energy-0.70-pivoted"
    assert list(task["models"]) == ["dense", "uniform", torch, ours]
    assert task["models"][ours]["nll"] == pytest.approx(task["models"][torch]["nll"], rel=1e-6)
    figures = document["variants"]
    (continued,) = document["continuations"]
    assert continued["models"][ours] == continued["models"][torch]
    assert figures[ours]["parameters"] == figures[torch]["parameters"]
    answers = [
        json.loads(ara("generate", "the river", "--backend", backend, *options, "-w", workspace, "--json").stdout)
        for backend in ("torch", "onnx")
        for options in (["--max-new-tokens", 30], ["--no-chat", "--max-new-tokens", 30])
    ]
    assert answers[0]["answer"] == answers[2]["answer"] and answers[1]["answer"] == answers[3]["answer"]
    assert len(answers[0]["answer"]) > 3 and not any(answer["empty"] for answer in answers)
    # The exported graph ends its turn at once.
    silent = Path(shutil.copytree(workspace / ours, workspace.parent / "silent"))
    about = json.loads((silent / "ara_export.json").read_text())
    about["decoder"]["eos"] = list(range(VOCABULARY))
    (silent / "ara_export.json").write_text(json.dumps(about))
    found = ara("generate", "river", "--max-new-tokens", 30, "--backend", "onnx", "--source", silent, "-q", "--json")
    assert json.loads(found.stdout)["empty"] is True and "the answer is empty: the model ended" in found.stderr
    refused(ara("generate", "x", "--max-new-tokens", 500, "-w", workspace, "-q"), 2, "are more than the 200 positions")
    refused(ara("generate", " ", "-w", workspace, "-q"), 2, "the prompt is empty")
    # A token that was added to the tokenizer alone: both have no row for it.
    for backend, folder in (("torch", next(workspace.glob("truncate/*/checkpoint"))), ("onnx", workspace / ours)):
        extended = Path(shutil.copytree(folder, workspace.parent / backend))
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["[PAD2]"], special_tokens=True)
        tokenizer.save_pretrained(extended)
        found = ara("generate", "the [PAD2]", "--backend", backend, "--source", extended, "-q")
        refused(found, 1, f"the prompt holds the token '[PAD2]' (id {len(tokenizer) - 1})")


def test_a_damaged_export_is_named_and_not_taken_for_none(workspace: Path) -> None:
    assert ara("export", "--execution-provider", "cpu", "--no-parity", "-w", workspace).exit_code == 0
    flip(next((workspace / "export").glob("*/manifest.json")), 60)
    refused(ara("generate", "the river", "--backend", "onnx", "-w", workspace, "-q"), 1, "manifest.json")


def test_an_export_answers_questions_as_its_checkpoint_does(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval scores the graph itself."""
    monkeypatch.setenv("ARA_DATA_DIR", str(write_questions(workspace.parent / "data")))
    monkeypatch.setenv("ARA_CACHE_DIR", str(workspace.parent / "cache"))
    assert ara("export", "--execution-provider", "cpu", "-w", workspace).exit_code == 0
    words = ["--tasks", "piqa,lambada_openai,wikitext", "--batch-size", 3, "--device", "cpu", "--dtype", "float32"]
    result = done("eval", "--backend", "onnx", *words, "-w", workspace, "--json")
    for task in json.loads(result.stdout)["results"]["tasks"].values():
        ours, torch = (task["models"][name] for name in ("export/energy-0.70-pivoted-fp32", "energy-0.70-pivoted"))
        assert ours["metrics"] == pytest.approx(torch["metrics"], rel=1e-4)


def test_an_export_answers_in_chat_as_its_checkpoint_does(workspace: Path, tmp_path: Path) -> None:
    said = [("Where is the river?", "Behind the mill."), ("Who bakes?", None)]
    path = tmp_path / "said.jsonl"
    with path.open("w") as file:
        for question, answer in said:
            messages = [{"role": "user", "content": question}]
            messages += [] if answer is None else [{"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    assert ara("export", "--execution-provider", "cpu", "-w", workspace).exit_code == 0
    words = ["--tasks", f"chat:{path}", "--max-new-tokens", 5, "--device", "cpu", "--dtype", "float32"]
    result = done("eval", "--backend", "onnx", *words, "-w", workspace, "--json")
    (task,) = json.loads(result.stdout)["results"]["tasks"].values()
    ours, torch = (task["models"][name] for name in ("export/energy-0.70-pivoted-fp32", "energy-0.70-pivoted"))
    assert ours["divergence"] == pytest.approx(torch["divergence"], rel=1e-4) and ours["empty"] == torch["empty"]


def test_the_end_of_a_turn_in_an_export(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """Evaluation stops where generation stops: at the tokens of the generation config."""
    source = Path(shutil.copytree(checkpoint("llama").folder, tmp_path / "source"))
    path = source / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, 9]}))
    command = ["export", "--execution-provider", "cpu", "--no-parity", "-q", "--source", source]
    assert ara(*command, "--output", tmp_path / "out").exit_code == 0
    config = AutoConfig.from_pretrained(source)
    assert stop_tokens(TorchLike(OnnxDecoder(tmp_path / "out"), config)) == {2, 9}  # type: ignore[arg-type]


def test_an_export_of_last_logits_cannot_be_evaluated(workspace: Path, tiny_text: str) -> None:
    assert ara("export", "--execution-provider", "cpu", "--last-logits", "-w", workspace).exit_code == 0
    words = ["--tasks", tiny_text, "--seq-len", 64, "--device", "cpu", "-w", workspace, "-q"]
    refused(ara("eval", "--backend", "onnx", *words), 1, "gives the logits of the last position only")
    assert ara("generate", "the river", "--backend", "onnx", "--max-new-tokens", 5, "-w", workspace).exit_code == 0


def test_overwrite_touches_nothing_but_exports(
    checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(checkpoint("llama").folder, tmp_path / "models" / "mine"))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    before = listing(tmp_path)
    command = [
        "export",
        "--execution-provider",
        "cpu",
        "--no-parity",
        "--overwrite",
        "-q",
        "--source",
        source,
        "--output",
    ]
    monkeypatch.chdir(precious)
    for output in (source, source / "onnx", source.parent, tmp_path, precious, "."):
        refused(ara(*command, output), 1, "contain one another")
    monkeypatch.chdir(tmp_path / "models")
    for output in (precious, precious / "thesis.txt"):
        refused(ara(*command, output), 1, "is not an export (no ara_export.json), so --overwrite does not touch it")
    assert listing(tmp_path) == before
    # What fails later leaves what was there, and no new parents.
    output = tmp_path / "exports" / "deep" / "mine"
    with monkeypatch.context() as patch:
        patch.setattr(writing.ir, "save", lambda *arguments, **options: 1 / 0)
        assert ara(*command, output).exit_code == 70
    assert listing(tmp_path) == before and not (tmp_path / "exports").exists()
    assert ara(*command, output).exit_code == 0
    first = (output / "ara_export.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(writing.ir, "save", lambda *arguments, **options: 1 / 0)
        ara(*command, output)
    assert (output / "ara_export.json").read_text() == first
    assert [path.name for path in output.parent.iterdir()] == ["mine"]


def test_the_end_of_a_turn_is_known(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """Chat models name it in generation_config.json alone."""
    source = Path(shutil.copytree(checkpoint("llama").folder, tmp_path / "source"))
    path = source / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, 9]}))
    command = ["export", "--execution-provider", "cpu", "--no-parity", "-q", "--source", source, "--output"]
    assert ara(*command, tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "ara_export.json").read_text())["decoder"]["eos"] == [2, 9]
    assert json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["eos_token_id"] == [2, 9]
    (source / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    refused(ara(*command, tmp_path / "other"), 1, "config.json cannot be used")


def test_a_tensor_without_a_place_is_found(checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = Path(shutil.copytree(checkpoint("llama").folder, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.sinks"] = tensors["model.norm.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    command = ["export", "--execution-provider", "cpu", "--no-parity", "-q", "--source", source, "--output"]
    refused(ara(*command, tmp_path / "out"), 1, "1 tensors of the checkpoint have no place in the graph")
