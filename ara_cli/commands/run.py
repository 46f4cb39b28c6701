"""``ara run``: the whole pipeline."""

from __future__ import annotations

from typing import Annotated

import typer

from ara.config import AllocateConfig, DecomposeConfig, EvalConfig, RecoverConfig, StageConfig, TruncateConfig
from ara.config.recover import NO_RECOVERY
from ara_cli.fields import Only
from ara_cli.options import LATENCY_OPTIONS, RemoveOption
from ara_cli.session import Session
from ara_cli.signature import Maker, command_line
from ara_cli.values import keep_of

_SHARED = ("seed", "device", "dtype")
_DECOMPOSE = Only(
    *(
        "model",
        "text",
        "samples",
        "seq_len",
        *_SHARED,
        "factors_dtype",
        "revision",
        "share_experts",
        "max_keep",
        "keep_moments",
    ),
    decomposition="method",
)
_ALLOCATE = Only("method", "layout", "rank_multiple", *LATENCY_OPTIONS, "held_out", *_SHARED, rank_samples="samples")
_TRUNCATE = Only("check")
_RECOVER = Only("samples", "held_out", *_SHARED)
_EVALUATE = Only("tasks", "max_windows", "include_path", "limit", "prompt", "device", "dtype", eval_seq_len="seq_len")
_AFTER = {
    "model": ("keep", "remove", *LATENCY_OPTIONS, "method", "decomposition", "layout", "rank_multiple"),
    "samples": ("rank_samples", "held_out"),
    "seed": ("tasks", "eval_seq_len", "max_windows", "include_path", "limit", "prompt"),
}


@command_line(after=_AFTER)
def command(
    *,
    decomposition: Annotated[Maker[DecomposeConfig], _DECOMPOSE],
    allocation: Annotated[Maker[AllocateConfig], _ALLOCATE],
    truncation: Annotated[Maker[TruncateConfig], _TRUNCATE],
    recovery: Annotated[Maker[RecoverConfig], _RECOVER],
    evaluation: Annotated[Maker[EvalConfig], _EVALUATE],
    keep: Annotated[
        list[float] | None, typer.Option(help=AllocateConfig.model_fields["keep"].description, metavar="FLOAT")
    ] = None,
    remove: RemoveOption = None,
    recover: Annotated[
        str,
        typer.Option(help="repair the checkpoint up to this level: closed, block, distill; or none", metavar="LEVEL"),
    ] = RecoverConfig.model_fields["level"].default,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="stop after the checkpoint is written")] = False,
    s: Session,
) -> None:
    """Decompose, allocate, truncate, recover and evaluate MODEL. Finished stages are reused.

    --method ara also trains masks. --keep may be repeated, for several compressed models. With --objective latency it
    is a share of the layers' time, which is measured on this machine.
    """
    decompose_config = decomposition()
    keeps = dict.fromkeys(keep_of(value, remove) for value in keep or (None,))
    allocate_configs = [allocation(keep=value) for value in keeps]
    later: dict[str, StageConfig] = {"truncate": truncation()}
    if recover != NO_RECOVERY:
        later["recover"] = recovery(level=recover)
    if not no_eval:
        later["eval"] = evaluation()
    from ara.stages.run import run_pipeline
    from ara_cli.render import show_pipeline
    from export.find import layers_in

    layers = layers_in(allocate_configs[0])
    views = run_pipeline(decompose_config, allocate_configs, later, s.run(), layers)
    show_pipeline(s.console, views, s.root)
