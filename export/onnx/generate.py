"""Greedy answers of a compressed model, in torch or in ONNX Runtime, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from ara.config import GenerateConfig
from ara.errors import ModelError
from ara.evaluation.generation import greedy_tokens, prompt_ids, stop_tokens, text_pieces
from ara.files import expand_user
from ara.models.checkpoint import load, load_tokenizer, read_config
from ara.models.context import check_room, context_length
from ara.models.silence import silence_transformers
from ara.models.vocabulary import check_tokens, token_rows
from ara.names import check_name
from ara.prompts import check_prompt
from ara.stages.common import Run
from ara.stages.truncate import CHECKPOINT
from export.onnx.report import REPORT_FILE

_NO_ROW = "take it out of the prompt; if the chat template put it there: --no-chat"


def answer(
    config: GenerateConfig,
    run: Run,
    prompt: str,
    *,
    checkpoint: str | None = None,
    source: Path | None = None,
    export: str | None = None,
) -> Iterator[str]:
    """Yield the answer to ``prompt``.

    Args:
        config: backend, length, chat template, placement.
        run: workspace and reporter.
        prompt: of the user.
        checkpoint: which result of ``ara truncate``, or whose export; the latest by default.
        source: a checkpoint folder, or an exported folder, instead of the workspace's.
        export: which export of the checkpoint; the latest by default.

    Raises:
        AraError: no checkpoint, no export, a chat template that cannot be used, a prompt that is too long, no text, or
            holds a token that the model has no row for.
    """
    prompt = check_prompt(prompt)
    folder = _folder(config, run, checkpoint, export) if source is None else _given(source, config.backend)
    run.report.step(f"{config.backend}: {folder}")
    with silence_transformers():
        if config.backend == "onnx":
            from export.onnx.runner import OnnxDecoder

            decoder = OnnxDecoder(folder)
            tokenizer = load_tokenizer(folder)
            ids = prompt_ids(tokenizer, prompt, config.chat)
            check_tokens(ids, decoder.vocabulary, tokenizer, "the prompt", _NO_ROW)
            check_room(len(ids), config.max_new_tokens, decoder.context)
            yield from text_pieces(tokenizer, decoder.generate(ids.numpy(), config.max_new_tokens))
            return
        # The prompt first: what is wrong with it needs no weights to be told.
        tokenizer = load_tokenizer(folder)
        ids = prompt_ids(tokenizer, prompt, config.chat)
        model = load(folder, config.device, config.dtype)
        check_tokens(ids, token_rows(model.config), tokenizer, "the prompt", _NO_ROW)
        check_room(len(ids), config.max_new_tokens, context_length(model.config))
        yield from text_pieces(tokenizer, greedy_tokens(model, ids, config.max_new_tokens, stop_tokens(model)))


def _folder(config: GenerateConfig, run: Run, checkpoint: str | None, export: str | None) -> Path:
    for name in (checkpoint, export):
        if name is not None:
            check_name(name)
    workspace = run.open()
    truncated = workspace.require("truncate", checkpoint)
    if config.backend == "torch":
        return truncated.path / CHECKPOINT
    from export.onnx.evaluation import latest_export

    return latest_export(workspace, truncated, export).path


def _given(source: Path, backend: str) -> Path:
    """Return the folder that was given, if it is one of the kind that the backend runs.

    Raises:
        ModelError: it is not.
    """
    folder = expand_user(source, "--source")
    if not folder.is_dir():
        raise ModelError(
            f"{folder} {'is no folder' if folder.exists() else 'does not exist'}",
            "--source wants a checkpoint folder, or with --backend onnx an exported one",
        )
    checkpoint, exported = ((folder / name).is_file() for name in ("config.json", REPORT_FILE))
    if backend == "torch" and exported and not checkpoint:
        raise ModelError(f"{folder} is an export, --backend torch runs checkpoints", "add --backend onnx")
    if backend == "onnx" and checkpoint and not exported:
        raise ModelError(
            f"{folder} is a checkpoint, --backend onnx runs exports",
            f"export it: ara export --onnx --source {quote(str(folder))} --output FOLDER",
        )
    if backend == "torch":
        read_config(folder)
    return folder
