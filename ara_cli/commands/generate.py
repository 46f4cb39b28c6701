"""``ara generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ara.config import GenerateConfig, build
from ara.errors import UsageError
from ara.prompts import check_prompt, piped_prompt
from ara_cli.options import WORKSPACE, JsonOption, QuietOption, WorkspaceOption, default, field, path_option
from ara_cli.session import session
from export.targets import backends, target_of

_C = GenerateConfig


def command(
    prompt: Annotated[str, typer.Argument(help="text to answer or to continue; - reads it from stdin")],
    backend: Annotated[str, field(_C, "backend", metavar="|".join(backends()))] = default(_C, "backend"),
    max_new_tokens: Annotated[int, field(_C, "max_new_tokens")] = default(_C, "max_new_tokens"),
    chat: Annotated[bool, field(_C, "chat", "--chat/--no-chat")] = True,
    checkpoint: Annotated[str | None, typer.Option(help="result of ara truncate [default: the latest]")] = None,
    export: Annotated[str | None, typer.Option(help="export that --backend onnx runs [default: the latest]")] = None,
    source: Annotated[
        Path | None,
        path_option(
            "--source", help="a checkpoint folder or an exported folder instead of a workspace's", metavar="FOLDER"
        ),
    ] = None,
    device: Annotated[str, field(_C, "device")] = default(_C, "device"),
    dtype: Annotated[str, field(_C, "dtype")] = default(_C, "dtype"),
    workspace: WorkspaceOption = WORKSPACE,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt with the compressed model, word by word."""
    with session(workspace, quiet, as_json) as s:
        config = build(
            GenerateConfig, backend=backend, max_new_tokens=max_new_tokens, chat=chat, device=device, dtype=dtype
        )
        target_of(config.backend, export)
        text = _piped() if prompt == "-" else check_prompt(prompt)
        from export.generate import answer

        pieces = []
        for piece in answer(config, s.run(), text, checkpoint=checkpoint, source=source, export=export):
            pieces.append(piece)
            s.console.stream(piece)
        s.console.stream("\n")
        s.console.result({"prompt": text, "answer": "".join(pieces), "backend": config.backend})


def _piped() -> str:
    """Return the prompt that comes from stdin.

    Raises:
        UsageError: there is no stdin, or what comes is no prompt.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("the prompt - is read from stdin, which is closed", "echo 'Who are you?' | ara generate -")
    return piped_prompt(sys.stdin.buffer)
