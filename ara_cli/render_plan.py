"""The tables of ``ara plan``."""

from __future__ import annotations

from ara.models.memory import Place
from ara.planning.plan import Plan, StagePlan
from ara.planning.sizes import StoredWeights
from ara_cli.console import Console, columns
from ara_cli.formatting import bytes_text, count_text, percent, seconds_text

_PLACES: dict[Place, str] = {
    "memory": "fits",
    "mapped": "pages of files come and go",
    "nowhere": "does not fit",
}


def show_plan(console: Console, plan: Plan) -> None:
    """Show the parameters of a model, what every stage takes, and the least machine."""
    console.table(
        f"{plan.model}: {plan.architecture}, {plan.blocks} blocks, {plan.layers} layers to factorise",
        columns("", "parameters", f"size in {plan.stored_dtype}"),
        [
            _parameters("model", plan.parameters, plan),
            _parameters("factorised layers", plan.linear_parameters, plan),
            _parameters("embedding and head", plan.embedding_parameters, plan),
            *(_parameters(f"{path}, kept as it is", count, plan) for path, count in plan.kept_parts.items()),
        ],
    )
    console.text(_budget(plan))
    if plan.max_keep is not None:
        console.text(
            f"factors: ranks up to --max-keep {plan.max_keep:g}; recover is not planned, as its level closed needs all"
        )
    console.text(_weights(plan.weights))
    console.table(
        f"Stages on {plan.why}",
        columns("stage", "memory", "at least", "weights", "disk", "FLOPs", "time, about"),
        [_row(stage) for stage in plan.stages],
    )
    console.text(
        f"free here: memory {bytes_text(plan.free_memory)}, disk {bytes_text(plan.free_disk)}; least machine: memory "
        f"{bytes_text(plan.least_memory)}, disk {bytes_text(plan.least_disk)}"
    )
    if plan.converted_bytes:
        console.text(
            f"the weights do not fit into memory: a copy in {plan.dtype}, {bytes_text(plan.converted_bytes)}, is "
            "written once into the cache (not with the --dtype of the files)"
        )
    _warn(console, plan)
    console.result(plan.plain())


def _parameters(what: str, count: int, plan: Plan) -> tuple[str, str, str]:
    return what, count_text(count), bytes_text(count / plan.parameters * plan.stored_bytes)


def _budget(plan: Plan) -> str:
    checkpoint = bytes_text(plan.checkpoint_bytes)
    if plan.size is not None:
        return f"weight files: at most {checkpoint} before ara quantise, {bytes_text(plan.size)} after it"
    kept = percent(plan.checkpoint_bytes / plan.stored_bytes)
    return f"checkpoint at keep {plan.keep:g}: {checkpoint}, {kept} of the dense model"


def _weights(weights: StoredWeights) -> str:
    if weights.unpacked:
        return f"weights: a GGUF file; unpacked they take {bytes_text(weights.unpacked)} in the cache"
    if weights.download:
        return f"weights: not on this machine; ara decompose downloads {bytes_text(weights.download)}"
    if weights.here is None:
        return "weights: the folder has none; ara decompose needs them"
    return f"weights: {bytes_text(weights.here)} on this machine"


def _row(stage: StagePlan) -> tuple[str, ...]:
    disk = bytes_text(stage.disk_bytes)
    if stage.scratch_bytes:
        disk += f" (+ {bytes_text(stage.scratch_bytes)} for the time being)"
    return (
        stage.stage + (" (optional)" if stage.optional else ""),
        bytes_text(stage.memory_bytes),
        bytes_text(stage.least_memory_bytes),
        _PLACES[stage.place],
        disk,
        f"{stage.flops:.1e}",
        "–" if stage.seconds is None else seconds_text(stage.seconds),
    )


def _warn(console: Console, plan: Plan) -> None:
    """Warn about stages that do not fit into memory, and about a disk that is too small."""
    small = [stage.stage for stage in plan.stages if stage.place == "nowhere"]
    if small:
        console.warn(f"too little memory is free for {', '.join(small)}")
    if plan.free_disk < plan.least_disk:
        console.warn(
            f"too little disk is free: {bytes_text(plan.free_disk)}, the stages and the weights need "
            f"{bytes_text(plan.least_disk)}"
        )
