"""``ara bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import BenchConfig, build
from ara_cli.options import (
    WORKSPACE,
    ForceOption,
    JsonOption,
    NameOption,
    QuietOption,
    WorkspaceOption,
    default,
    field,
    joined,
    whole_numbers,
)
from ara_cli.session import session
from export.targets import backends

_C = BenchConfig


def command(
    prefill: Annotated[str, field(_C, "prefill", metavar="LENGTHS")] = joined(default(_C, "prefill")),
    decode: Annotated[str, field(_C, "decode", metavar="LENGTHS")] = joined(default(_C, "decode")),
    batch: Annotated[str, field(_C, "batch", metavar="SIZES")] = joined(default(_C, "batch")),
    rounds: Annotated[int, field(_C, "rounds")] = default(_C, "rounds"),
    threads: Annotated[int | None, field(_C, "threads")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="result of ara truncate to measure [default: the latest]")
    ] = None,
    backend: Annotated[str, field(_C, "backend", metavar="|".join(backends()))] = default(_C, "backend"),
    export: Annotated[
        str | None, typer.Option(help="export that --backend onnx measures [default: the latest]")
    ] = None,
    device: Annotated[str, field(_C, "device")] = default(_C, "device"),
    dtype: Annotated[str, field(_C, "dtype")] = default(_C, "dtype"),
    name: NameOption = None,
    workspace: WorkspaceOption = WORKSPACE,
    force: ForceOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure speed, memory and size of the dense and the compressed model, in turn in one run."""
    with session(workspace, quiet, as_json, force) as s:
        config = build(
            BenchConfig,
            prefill=whole_numbers(prefill, "--prefill"),
            decode=whole_numbers(decode, "--decode"),
            batch=whole_numbers(batch, "--batch"),
            rounds=rounds,
            threads=threads,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        from ara.stages.bench import bench
        from ara_cli.render import show_end
        from ara_cli.render_bench import show_bench
        from export.find import find_for_bench

        find = find_for_bench(config.backend, export)
        view = bench(config, s.run(), checkpoint=checkpoint, name=name, find_export=find)
        show_bench(s.console, view)
        show_end(s.console, view, workspace)
