"""``ara generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import GenerateConfig
from ara.prompts import check_prompt, piped_prompt
from ara_cli.options import SourceOption, WhichCheckpoint, WhichExport
from ara_cli.session import Session
from ara_cli.signature import command_line
from ara_cli.streams import piped_input
from export.targets import target_of


@command_line(after={"source": ("device", "dtype")}, without=("force", "offload"))
def command(
    *,
    prompt: Annotated[str, typer.Argument(help="text to answer or to continue; - reads it from stdin")],
    config: GenerateConfig,
    which: Annotated[WhichCheckpoint, ""],
    exported: Annotated[WhichExport, "runs"],
    source: SourceOption = None,
    s: Session,
) -> None:
    """Answer a prompt with the compressed model, word by word."""
    export = exported.asked(config.backend)
    target_of(config.backend)
    text = piped_prompt(piped_input("echo 'Who are you?' | ara generate -")) if prompt == "-" else check_prompt(prompt)
    from export.answering import Answerer

    model = Answerer(config, s.run(), checkpoint=which.asked, source=source, export=export)
    found = model.answer(model.prompt_ids(text, config.chat))
    for piece in found:
        s.console.stream(piece)
    s.console.stream("\n")
    document = {"prompt": text, "answer": found.text, "empty": found.is_empty, "backend": config.backend}
    s.console.result({**document, "seed": model.seed})
