"""Greedy answers of a compressed model, in torch or in ONNX Runtime, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ara.config import GenerateConfig
from ara.errors import UsageError
from ara.evaluation.generation import greedy_tokens, prompt_ids, stop_tokens, text_pieces
from ara.models.context import context_length
from ara.models.quiet import quiet_transformers
from ara.models.vocabulary import check_tokens, token_rows
from ara.names import check_name
from ara.stages.common import Run
from ara.stages.truncate import CHECKPOINT

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
        AraError: no checkpoint, no export, a prompt that is too long or holds a token that the model has no row for.
    """
    from transformers import AutoTokenizer

    folder = source or _folder(config, run, checkpoint, export)
    run.report.step(f"{config.backend}: {folder}")
    with quiet_transformers():
        if config.backend == "onnx":
            from export.runner import OnnxDecoder

            decoder = OnnxDecoder(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            ids = prompt_ids(tokenizer, prompt, config.chat)
            check_tokens(ids, decoder.vocabulary, tokenizer, "the prompt", _NO_ROW)
            _check(len(ids), config.max_new_tokens, decoder.context)
            yield from text_pieces(tokenizer, decoder.generate(ids.numpy(), config.max_new_tokens))
            return
        from ara.models.checkpoint import load

        model = load(folder, config.device, config.dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        ids = prompt_ids(tokenizer, prompt, config.chat)
        check_tokens(ids, token_rows(model.config), tokenizer, "the prompt", _NO_ROW)
        limit = context_length(model.config)
        if limit is not None:
            _check(len(ids), config.max_new_tokens, limit)
        yield from text_pieces(tokenizer, greedy_tokens(model, ids, config.max_new_tokens, stop_tokens(model)))


def _folder(config: GenerateConfig, run: Run, checkpoint: str | None, export: str | None) -> Path:
    for name in (checkpoint, export):
        if name is not None:
            check_name(name)
    workspace = run.open()
    truncated = workspace.require("truncate", checkpoint)
    if config.backend == "torch":
        return truncated.path / CHECKPOINT
    from export.evaluation import latest_export

    return latest_export(workspace, truncated, export).path


def _check(prompt: int, new: int, context: int) -> None:
    if prompt + new > context:
        raise UsageError(
            f"{prompt} tokens of prompt and {new} new ones are more than the {context} positions of the model",
            f"use --max-new-tokens {context - prompt}" if context > prompt else "shorten the prompt",
        )
