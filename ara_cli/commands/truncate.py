"""``ara truncate``."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import TruncateConfig, build
from ara_cli.options import (
    WORKSPACE,
    ForceOption,
    JsonOption,
    NameOption,
    QuietOption,
    WorkspaceOption,
    default,
    field,
)
from ara_cli.session import session

_C = TruncateConfig


def command(
    allocation: Annotated[str | None, typer.Option(help="allocation to cut at [default: the latest]")] = None,
    dtype: Annotated[str, field(_C, "dtype")] = default(_C, "dtype"),
    densify: Annotated[bool, field(_C, "densify", "--densify")] = default(_C, "densify"),
    max_shard_size: Annotated[str, field(_C, "max_shard_size")] = default(_C, "max_shard_size"),
    name: NameOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    force: ForceOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Cut the factors at the allocated ranks and write a checkpoint that transformers loads."""
    with session(workspace, quiet, as_json, force) as s:
        config = build(TruncateConfig, dtype=dtype, densify=densify, max_shard_size=max_shard_size)
        from ara.stages.truncate import truncate
        from ara_cli.render import show_checkpoint, show_end

        view = truncate(config, s.run(), allocation=allocation, name=name)
        show_checkpoint(s.console, view)
        show_end(s.console, view, workspace)
