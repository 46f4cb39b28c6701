"""``ara bench --backend vllm``: throughput and time to the first token of a server."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from ara.artifacts.benchmark import (
    BenchmarkResults,
    ModelCost,
    RatioFigures,
    ServingCase,
    ServingFigures,
)
from ara.artifacts.checkpoint import CHECKPOINT, CheckpointResults, label_of
from ara.artifacts.evaluation import DENSE
from ara.config import BenchConfig
from ara.environment import machine
from ara.evaluation.cost import cache_bytes
from ara.evaluation.runtime import Runtime, Service, ServiceSize, Timing
from ara.evaluation.speed import ratio
from ara.evaluation.timing import turns
from ara.models.context import check_window
from ara.models.placement import torch_dtype
from ara.models.sources import ModelSource
from ara.stages.bench import percentiles, refuse_others
from ara.stages.common import Run, begin, groups_in_memory, model_of, open_task, placement_in
from ara.stages.model_folders import ModelFolder, written
from ara.workspace.view import StageView

# Options of the other backends. Given with this one, they would change nothing.
_OTHERS = ("prefill", "decode", "batch", "threads")
# Folder for the dense model, within the unfinished folder of the stage.
_ASIDE = "aside"


def bench_serving(
    config: BenchConfig, run: Run, runtime: Runtime, *, checkpoint: str | None = None, name: str | None = None
) -> StageView:
    """Serve the dense model and the checkpoint, and store throughput, times to the first token, memory and sizes.

    Args:
        config: numbers and lengths of requests, rounds, dtype.
        run: workspace and reporter.
        runtime: loads the models and answers the requests.
        checkpoint: NAME or STAGE/NAME; the latest by default.
        name: of the result; by default checkpoint and backend.

    Raises:
        UnavailableError: the runtime is not installed.
        UsageError: an option that this backend has no use for, or requests beyond the model's positions.
        AraError: a stage is missing or stale, or the runtime cannot run a model.
    """
    started = begin(name, checkpoint)
    resolved = _resolved(config, runtime, run)
    with open_task("bench", run, started) as task:
        workspace = task.workspace
        truncated = workspace.require("checkpoint", checkpoint)
        run.report.step(f"Serving {truncated.key} and the dense model in {runtime.title}")
        decomposition = workspace.ancestor(truncated, "factors", verify=False)
        source = model_of(decomposition, run)
        check_window(config.prompt_tokens + config.new_tokens, source.config, "--prompt-tokens plus --new-tokens")
        settings = resolved.model_dump(mode="json", exclude=set(_OTHERS))
        task.describe(name or f"{truncated.name}-{config.backend}", settings, [truncated, decomposition])
        if (done := task.done()) is not None:
            return done
        with task.writer() as stage:
            aside = stage.folder / _ASIDE
            models = _models(truncated, source, resolved, aside)
            results = _measure(models, source, resolved, runtime, run)
            shutil.rmtree(aside)
            results.write_file(stage)
        return task.view()


def _resolved(config: BenchConfig, runtime: Runtime, run: Run) -> BenchConfig:
    """Return the config with device and dtype resolved."""
    placement = placement_in(runtime, config, run)
    hint = "its requests are described by --concurrency, --prompt-tokens and --new-tokens"
    refuse_others(config, _OTHERS, hint)
    return config.model_copy(update={"device": placement.device, "dtype": placement.dtype})


def _models(
    truncated: StageView, source: ModelSource, config: BenchConfig, aside: Path
) -> dict[str, tuple[ModelFolder, int]]:
    """Return folder and bytes on disk of the dense model, which is written to ``aside``, and of the checkpoint."""
    results = CheckpointResults.read(truncated)
    chosen = ModelFolder(truncated.path / CHECKPOINT, results.parameters)
    return {
        DENSE: (written(source, torch_dtype(config.dtype), aside), results.dense_weight_bytes),
        label_of(truncated): (chosen, results.disk_bytes),
    }


def _measure(
    models: Mapping[str, tuple[ModelFolder, int]], source: ModelSource, config: BenchConfig, runtime: Runtime, run: Run
) -> BenchmarkResults:
    itemsize = torch_dtype(config.dtype).itemsize
    most, tokens = max(config.concurrency), config.prompt_tokens + config.new_tokens
    size = ServiceSize(most, tokens, cache_bytes(source.config, most * tokens, itemsize))
    each = models[DENSE][0].parameters * itemsize + size.cache_bytes
    names = list(models)
    groups = [[name] for name in names]
    if runtime.several_at_once(config.device):
        groups = groups_in_memory(names, each, config.device, run.report)
    timings: dict[int, dict[str, list[Timing]]] = {number: {} for number in config.concurrency}
    costs: dict[str, ModelCost] = {}
    threads, vocabulary = 1, source.config.get_text_config().vocab_size
    with run.report.bar("Serving", len(names) * len(config.concurrency) * (config.rounds + 1)) as bar:
        for group in groups:
            run.report.fact(f"loading {', '.join(group)}")
            with ExitStack() as stack:
                services = {
                    name: stack.enter_context(runtime.serve(models[name][0].folder, config.dtype, size))
                    for name in group
                }
                for number in config.concurrency:
                    timings[number] |= in_turn(services, number, config, vocabulary, bar.advance)
                for name, service in services.items():
                    stored, disk = models[name]
                    threads = service.threads
                    costs[name] = ModelCost(
                        stored.parameters, stored.parameters * itemsize, disk, service.peak_memory() or None
                    )
    interleaved = len(groups) == 1
    return BenchmarkResults(
        chosen=names[-1],
        backend=config.backend,
        device=config.device,
        machine=machine(),
        precision=config.dtype,
        threads=threads,
        interleaved=interleaved,
        models=costs,
        last_logits=True,
        cases=(),
        serving=tuple(serving_case(number, timings[number], config, interleaved) for number in config.concurrency),
    )


def in_turn(
    services: Mapping[str, Service], number: int, config: BenchConfig, vocabulary: int, advance: Callable[[], object]
) -> dict[str, list[Timing]]:
    """Return the timings of every model in every round; each round has prompts of its own, the same for all models.

    The first round is a warm-up and does not count.

    Args:
        services: models that run, by name.
        number: requests at once.
        config: lengths and rounds.
        vocabulary: number of token ids.
        advance: called after every model and round.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in services}
    generator = torch.Generator().manual_seed(number)
    for turn, names in turns(services, config.rounds):
        prompts = torch.randint(vocabulary, (number, config.prompt_tokens), generator=generator).tolist()
        for name in names:
            timing = services[name].answer(prompts, config.new_tokens)
            if turn:
                timings[name].append(timing)
            advance()
    return timings


def serving_case(
    number: int, timings: Mapping[str, Sequence[Timing]], config: BenchConfig, interleaved: bool
) -> ServingCase:
    """Return the figures for one number of requests; all models are compared with the first.

    Args:
        number: requests at once.
        timings: per model and round.
        config: lengths.
        interleaved: whether the models ran in the same rounds; else there is no ratio.
    """
    seconds = {name: [timing.seconds for timing in found] for name, found in timings.items()}
    base = next(iter(seconds.values()))
    tokens = number * config.new_tokens
    rows = {
        name: ServingFigures(
            output_tokens_per_second=percentiles([tokens / value for value in seconds[name]]),
            first_token_seconds=percentiles([statistics.median(timing.first_tokens) for timing in found]),
            ratio=RatioFigures(**asdict(ratio(base, seconds[name]))) if interleaved else None,
        )
        for name, found in timings.items()
    }
    return ServingCase(number, config.prompt_tokens, config.new_tokens, rows)
