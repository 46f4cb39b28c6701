"""``ara decompose``."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import DecomposeConfig, build
from ara_cli.options import (
    WORKSPACE,
    ForceOption,
    JsonOption,
    QuietOption,
    WorkspaceOption,
    default,
    field,
    pairs,
)
from ara_cli.session import session

_C = DecomposeConfig


def command(
    model: Annotated[str, typer.Argument(help=_C.model_fields["model"].description, metavar="MODEL")],
    method: Annotated[str, field(_C, "method", "--method", "-m")] = default(_C, "method"),
    option: Annotated[list[str] | None, field(_C, "options", "--option", "-O", metavar="NAME=VALUE")] = None,
    text: Annotated[str, field(_C, "text", metavar="TEXT")] = default(_C, "text"),
    samples: Annotated[int, field(_C, "samples")] = default(_C, "samples"),
    seq_len: Annotated[int, field(_C, "seq_len")] = default(_C, "seq_len"),
    batch_size: Annotated[int, field(_C, "batch_size")] = default(_C, "batch_size"),
    seed: Annotated[int, field(_C, "seed")] = default(_C, "seed"),
    exclude: Annotated[list[str] | None, field(_C, "exclude", metavar="PATTERN")] = None,
    device: Annotated[str, field(_C, "device")] = default(_C, "device"),
    dtype: Annotated[str, field(_C, "dtype")] = default(_C, "dtype"),
    moment_memory: Annotated[float | None, field(_C, "moment_memory", metavar="GIB")] = None,
    revision: Annotated[str | None, field(_C, "revision")] = None,
    name: Annotated[str | None, typer.Option(help="name of the result [default: the method]")] = None,
    workspace: WorkspaceOption = WORKSPACE,
    force: ForceOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Factor every linear layer of MODEL once; every later budget is cut from these factors."""
    with session(workspace, quiet, as_json, force) as s:
        config = build(
            DecomposeConfig,
            model=model,
            method=method,
            options=pairs(option),
            text=text,
            samples=samples,
            seq_len=seq_len,
            batch_size=batch_size,
            seed=seed,
            exclude=tuple(exclude or ()),
            device=device,
            dtype=dtype,
            moment_memory=moment_memory,
            revision=revision,
        )
        from ara.stages.decompose import decompose
        from ara_cli.render import show_decomposition, show_end

        view = decompose(config, s.run(), name)
        show_decomposition(s.console, view)
        show_end(s.console, view, workspace)
