"""``ara generate``: the greedy answer of a compressed model, in torch or in an export's runtime, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, TypeAlias

from ara.artifacts.checkpoint import CHECKPOINT
from ara.config import GenerateConfig
from ara.errors import ModelError
from ara.evaluation.generation import greedy_tokens, prompt_ids, stop_tokens, text_pieces, why_empty
from ara.files import expand_user
from ara.models.checkpoint import load, load_tokenizer, read_config
from ara.models.context import check_room, context_length
from ara.models.silence import silence_transformers
from ara.models.vocabulary import check_tokens, token_rows
from ara.names import check_which
from ara.prompts import check_prompt
from ara.stages.common import Run
from export.base import REPORT_FILE, Target
from export.find import latest_export
from export.targets import TARGETS, target_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A tokenizer, and the tokens of an answer as they are computed.
_Answer: TypeAlias = "tuple[PreTrainedTokenizerBase, Iterator[int]]"
# What to do about an empty answer.
_REPAIR = "calibrate with conversations (ara decompose --text c4:0.8,chat:0.2), or repair the checkpoint (ara recover)"
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
    """Yield the answer to ``prompt``; an empty answer is reported as a warning.

    Args:
        config: backend, length, chat template, placement.
        run: workspace and reporter.
        prompt: text of the user.
        checkpoint: which one, as NAME or STAGE/NAME; the latest by default.
        source: a checkpoint folder or an exported folder to run instead of a result of the workspace.
        export: which export of the checkpoint; the latest by default.

    Raises:
        AraError: no checkpoint, no export, an unusable chat template, or a prompt that is too long, is no text, or has
            a token without a row in the embedding.
    """
    prompt = check_prompt(prompt)
    target = target_of(config.backend)
    folder = _folder(target, run, checkpoint, export) if source is None else _given(source, target)
    run.report.step(f"{config.backend}: {folder}")
    with silence_transformers():
        tokenizer, tokens = (
            _in_torch(config, folder, prompt) if target is None else _exported(config, target, folder, prompt)
        )
        yield from _reported(tokenizer, tokens, run)


def _reported(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int], run: Run) -> Iterator[str]:
    """Yield the text of tokens, and warn at its end if nothing of it can be seen."""
    count, text = 0, ""

    def counted() -> Iterator[int]:
        nonlocal count
        for token in tokens:
            count += 1
            yield token

    for piece in text_pieces(tokenizer, counted()):
        text += piece
        yield piece
    if (why := why_empty(count, text)) is not None:
        run.report.warn(f"the answer is empty: {why}; {_REPAIR}")


def _exported(config: GenerateConfig, target: Target, folder: Path, prompt: str) -> _Answer:
    """Return the answer of an export."""
    decoder = target.for_generate(folder)
    tokenizer = load_tokenizer(folder)
    ids = prompt_ids(tokenizer, prompt, config.chat)
    check_tokens(ids, decoder.vocabulary, tokenizer, "the prompt", _NO_ROW)
    check_room(len(ids), config.max_new_tokens, decoder.context)
    return tokenizer, decoder.generate(ids.numpy(), config.max_new_tokens)


def _in_torch(config: GenerateConfig, folder: Path, prompt: str) -> _Answer:
    """Return the answer of a checkpoint; what needs no weights is checked before they are read."""
    tokenizer = load_tokenizer(folder)
    ids = prompt_ids(tokenizer, prompt, config.chat)
    model = load(folder, config.device, config.dtype)
    check_tokens(ids, token_rows(model.config), tokenizer, "the prompt", _NO_ROW)
    check_room(len(ids), config.max_new_tokens, context_length(model.config))
    return tokenizer, greedy_tokens(model, ids, config.max_new_tokens, stop_tokens(model))


def _folder(target: Target | None, run: Run, checkpoint: str | None, export: str | None) -> Path:
    """Return the folder of the checkpoint, or of its export for the target."""
    for which in (checkpoint, export):
        if which is not None:
            check_which(which)
    workspace = run.open()
    truncated = workspace.require("checkpoint", checkpoint)
    if target is None:
        return truncated.path / CHECKPOINT
    return latest_export(target, workspace, truncated, export).path


def _given(source: Path, target: Target | None) -> Path:
    """Return the folder that ``--source`` names; one that the backend cannot run is a ``ModelError``."""
    names = " or ".join(f"--backend {name}" for name in TARGETS.names())
    folder = expand_user(source, "--source")
    if not folder.is_dir():
        raise ModelError(
            f"{folder} {'is no folder' if folder.exists() else 'does not exist'}",
            f"--source wants a checkpoint folder, or with {names} an exported one",
        )
    checkpoint, exported = ((folder / name).is_file() for name in ("config.json", REPORT_FILE))
    if target is None:
        if exported and not checkpoint:
            raise ModelError(f"{folder} is an export, --backend torch runs checkpoints", f"add {names}")
        read_config(folder)
    elif checkpoint and not exported:
        raise ModelError(
            f"{folder} is a checkpoint, --backend {target.name} runs exports",
            f"export it: {target.command} --source {quote(str(folder))} --output FOLDER",
        )
    return folder
