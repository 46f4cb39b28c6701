"""From the results in manifests to the parts of the report. What a result does not say becomes ``None``.

A result that another version of ara has written in another form raises KeyError, TypeError, AttributeError or
ValueError; the caller leaves it out and says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ara.data.texts import FILE_PREFIX
from ara.layout_names import DEFAULT_LAYOUT
from ara.reporting.document import (
    Allocated,
    AllocatorRow,
    Base,
    BenchCase,
    Benched,
    BenchModel,
    BenchRow,
    Compared,
    Continuation,
    Curve,
    Decomposed,
    Difference,
    Evaluated,
    Exported,
    Guard,
    HarnessResult,
    HarnessRow,
    Kind,
    ModelSize,
    ParityRow,
    Spread,
    Step,
    Stored,
    TextResult,
    TextRow,
    Trained,
    Work,
    ZeroShot,
)
from ara.reporting.sharing import display_name, shared_origin, shared_text
from ara.workspace.manifest import Manifest

DENSE, UNIFORM = "dense", "uniform"


def read_base(model: Mapping[str, Any]) -> Base:
    """Return the dense model of a manifest."""
    return Base(
        name=display_name(dict(model)),
        requested=model["requested"],
        kind=model["kind"],
        architecture=model.get("architecture"),
        revision=model.get("revision"),
        fingerprint=model["fingerprint"],
    )


def read_decomposition(manifest: Manifest) -> Decomposed:
    """Return what the report says of the factors."""
    config, results = manifest.config, manifest.results
    windows, origin = results.get("windows"), results.get("text")
    return Decomposed(
        name=manifest.name,
        method=config["method"],
        text=shared_text(config["text"]),
        origin=shared_origin(origin) if origin else None,
        windows=tuple(windows) if windows else None,
        dtype=config.get("dtype"),
        seed=manifest.seed,
    )


def read_allocation(manifest: Manifest) -> Allocated:
    """Return what the report says of the ranks."""
    config, results = manifest.config, manifest.results
    guard = results.get("guard")
    counted = ("parameters_dense", "parameters", "keep")
    sizes = [f"{what}_{figure}" for what in ("linear", "model") for figure in counted]
    return Allocated(
        name=manifest.name,
        method="from a file" if config.get("ranks_sha256") else config["method"],
        keep=config.get("keep"),
        layout=config.get("layout", DEFAULT_LAYOUT),
        kinds=tuple(
            Kind(kind=kind, **{key: row[key] for key in Kind.model_fields if key != "kind"})
            for kind, row in results["kinds"].items()
        ),
        guard=_guard(guard) if guard else None,
        **{key: results[key] for key in sizes},
    )


def _guard(guard: Mapping[str, Any]) -> Guard:
    winner, losses = guard["winner"], guard["held_out"]
    behind = {
        name: None if losses[name] is None else losses[name] - losses[winner] for name in losses if name != "dense"
    }
    return Guard(winner=winner, held_out=losses, behind=behind, stderr=guard["stderr"])


def read_stored(name: str, results: Mapping[str, Any], dtype: str) -> Stored:
    """Return what the report says of the checkpoint, from the figures of the truncation."""
    keys = ("densified", "low_rank_layers", "dense_layers", "dense_weight_bytes", "disk_bytes")
    share = results["disk_bytes"] / results["dense_weight_bytes"]
    return Stored(name=name, dtype=dtype, disk_keep=share, **{key: results[key] for key in keys})


def read_work(manifest: Manifest) -> Work:
    """Return what the report says of the making of one result."""
    config = manifest.config
    return Work(
        key=f"{manifest.stage}/{manifest.name}",
        device=config.get("device"),
        dtype=config.get("dtype"),
        **manifest.model_dump(include={"id", "created", "command", "seconds", "peak_memory_bytes"}),
    )


def read_training(manifest: Manifest) -> Trained:
    """Return the curves of a training."""
    results = manifest.results
    figures = ("steps", "best_step", "start_held_out", "held_out", "seconds", "backward_passes")
    curves = tuple(
        Curve(
            keep=float(keep),
            won=budget["start_held_out"] - budget["held_out"],
            log=tuple(
                Step(step=row["step"], keep=row["keep"], loss=_finite(row["loss"]), held_out=_finite(row["held_out"]))
                for row in results["log"].get(keep, [])
            ),
            **{key: budget[key] for key in figures},
        )
        for keep, budget in results["budgets"].items()
    )
    config = manifest.config
    return Trained(name=manifest.name, objective=config["objective"], loss=config["loss"], curves=curves)


def read_evaluation(manifest: Manifest) -> Evaluated:
    """Return an evaluation: perplexities, zero-shot tasks and continuations, as far as it has them."""
    results, config = manifest.results, manifest.config
    chosen, variants = results["chosen"], results["variants"]
    tasks: Mapping[str, Any] = results["tasks"]
    names = text_labels(list(tasks))
    sizes = tuple(
        ModelSize(
            name=name,
            parameters=row["parameters"],
            weight_bytes=row["weight_bytes"],
            disk_bytes=row.get("disk_bytes"),
            linear_keep=row["linear_keep"],
            model_keep=row["model_keep"],
        )
        for name, row in variants.items()
    )
    checksums = config.get("text_sha256") or {}
    texts = [(task, row) for task, row in tasks.items() if row.get("kind") != "harness"]
    harness = [(task, row) for task, row in tasks.items() if row.get("kind") == "harness"]
    mean = results.get("zero_shot")
    return Evaluated(
        name=manifest.name,
        chosen=chosen,
        device=config.get("device"),
        dtype=config.get("dtype"),
        interleaved=results.get("interleaved"),
        models=sizes,
        texts=tuple(_text(names[task], row, checksums.get(task), results) for task, row in texts),
        harness=tuple(_harness(names[task], row, checksums.get(task)) for task, row in harness),
        zero_shot=_zero_shot(mean) if mean else None,
        continuations=_continuations(results),
    )


def text_labels(tasks: Sequence[str]) -> dict[str, str]:
    """Return what tasks are called in a shared file; files of one name in several folders are numbered."""
    names = {"wikitext2": "WikiText-2", "c4": "C4"}
    labels: dict[str, str] = {}
    for task in tasks:
        label = names.get(task, shared_text(task) if task.startswith(FILE_PREFIX) else task)
        same = sum(known == label or known.startswith(f"{label} (") for known in labels.values())
        labels[task] = f"{label} ({same + 1})" if same else label
    return labels


def _text(label: str, row: Mapping[str, Any], sha256: str | None, results: Mapping[str, Any]) -> TextResult:
    models, chosen = row["models"], results["chosen"]
    # Speeds of models that were not run in turn are those of different spells of the machine.
    dense = spread(models[DENSE].get("tokens_per_second")) if results.get("interleaved") else None
    return TextResult(
        task=label,
        origin=shared_origin(row["text"]) if row.get("text") else None,
        sha256=sha256,
        windows=row["windows"],
        seq_len=row["seq_len"],
        models={name: _text_row(figures, None if name == DENSE else dense) for name, figures in models.items()},
        over_uniform=_paired(models[chosen], models[UNIFORM]) if UNIFORM in models and chosen in models else None,
    )


def _text_row(figures: Mapping[str, Any], dense: Spread | None) -> TextRow:
    divergence, speed = figures.get("divergence") or {}, spread(figures.get("tokens_per_second"))
    ratio = None
    if speed is not None and dense is not None:
        ratio = Spread(median=speed.median / dense.median, low=speed.low / dense.high, high=speed.high / dense.low)
    return TextRow(
        nll=figures["nll"],
        stderr=figures.get("nll_stderr", figures.get("stderr")),
        perplexity=figures["perplexity"],
        speed=speed,
        ratio=ratio,
        kl=divergence.get("kl"),
        kl_stderr=divergence.get("kl_stderr"),
        agreement=divergence.get("agreement"),
    )


def _paired(one: Mapping[str, Any], other: Mapping[str, Any]) -> Difference | None:
    """Return the mean difference of two models' NLLs over the windows that both have read, and its standard error."""
    first, second = one.get("window_nlls"), other.get("window_nlls")
    if not first or not second or len(first) != len(second):
        return None
    differences = [a - b for a, b in zip(first, second, strict=True)]
    stderr = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return Difference(difference=statistics.fmean(differences), stderr=stderr)


def _harness(label: str, row: Mapping[str, Any], sha256: str | None) -> HarnessResult:
    return HarnessResult(
        task=label,
        metric=row["metric"],
        sha256=sha256,
        examples=row.get("examples"),
        of=row.get("of"),
        seed=row.get("seed"),
        models={name: _harness_row(figures, "value") for name, figures in row["models"].items()},
        compared=_differences(row),
    )


def _harness_row(figures: Mapping[str, Any], key: str) -> HarnessRow:
    return HarnessRow(value=figures[key], stderr=figures.get("stderr"), retained=figures.get("retained"))


def _differences(row: Mapping[str, Any]) -> dict[str, Difference]:
    keys = ("difference", "stderr", "p", "test")
    return {
        name: Difference(**{key: found[key] for key in keys if key in found})
        for name, found in (row.get("compared") or {}).items()
        if found and found.get("difference") is not None
    }


def _zero_shot(mean: Mapping[str, Any]) -> ZeroShot:
    return ZeroShot(
        tasks=tuple(mean["tasks"]),
        models={name: _harness_row(figures, "mean") for name, figures in mean["models"].items()},
        compared=_differences(mean),
    )


def _continuations(results: Mapping[str, Any]) -> tuple[Continuation, ...]:
    if results.get("continuations"):
        return tuple(Continuation(prompt=row["prompt"], models=row["models"]) for row in results["continuations"])
    if results.get("prompt") is None:
        return ()
    models = {name: row["continuation"] for name, row in results["variants"].items() if "continuation" in row}
    return (Continuation(prompt=results["prompt"], models=models),) if models else ()


def read_bench(manifest: Manifest) -> Benched:
    """Return a benchmark."""
    results = manifest.results
    keys = BenchModel.model_fields
    return Benched(
        name=manifest.name,
        chosen=results["chosen"],
        backend=results.get("backend"),
        device=results.get("device"),
        precision=results.get("precision"),
        threads=results.get("threads"),
        machine=results.get("machine"),
        interleaved=results.get("interleaved"),
        models={name: BenchModel(**{key: row.get(key) for key in keys}) for name, row in results["models"].items()},
        cases=tuple(
            BenchCase(
                kind=case["kind"],
                batch=case["batch"],
                past=case["past"],
                new=case["new"],
                models={
                    name: BenchRow(
                        seconds=spread(row.get("seconds")),
                        tokens_per_second=spread(row.get("tokens_per_second")),
                        # Rounds of different times make no ratio, even where an earlier version has written one.
                        ratio=spread(row.get("ratio")) if results.get("interleaved") else None,
                        predicted=row.get("predicted"),
                        macs=row.get("macs"),
                        bytes_read=row.get("bytes_read"),
                    )
                    for name, row in case["models"].items()
                },
            )
            for case in results["cases"]
        ),
    )


def read_comparison(manifest: Manifest) -> Compared:
    """Return a comparison of allocators."""
    methods = manifest.results["methods"]
    tasks = list(methods[DENSE]["tasks"])
    names = text_labels(tasks)
    return Compared(
        name=manifest.name,
        keep=manifest.config["keep"],
        layout=manifest.config.get("layout", DEFAULT_LAYOUT),
        tasks=tuple(names[task] for task in tasks),
        methods={
            method: AllocatorRow(
                held_out=_finite(row.get("held_out")),
                perplexity={names[task]: found["perplexity"] for task, found in row.get("tasks", {}).items()},
                gap_closed={names[task]: found.get("gap_closed") for task, found in row.get("tasks", {}).items()},
                dense_layers=row.get("dense_layers"),
                seconds=row.get("seconds"),
                backward_passes=row.get("backward_passes"),
                error=row.get("error"),
            )
            for method, row in methods.items()
        },
    )


def read_export(manifest: Manifest) -> Exported:
    """Return an export and its comparison with torch."""
    results, keys = manifest.results, ParityRow.model_fields
    files, proof = results.get("files"), results.get("parity") or {}
    return Exported(
        name=manifest.name,
        precision=results["precision"],
        provider=results.get("execution_provider"),
        graph_bytes=sum(record["bytes"] for record in files.values()) if files else None,
        parity=tuple(ParityRow(**{key: case[key] for key in keys}) for case in proof.get("cases", ())),
    )


def spread(value: Mapping[str, Any] | None) -> Spread | None:
    """Return a median with its range, written as low and high or as percentiles."""
    if value is None:
        return None
    low, high = ("low", "high") if "low" in value else ("p10", "p90")
    return Spread(median=value["median"], low=value[low], high=value[high])


def _finite(value: float | None) -> float | None:
    """Return ``value`` unless it is NaN or infinite: a step that failed is a gap in the curve."""
    return value if value is not None and math.isfinite(value) else None
