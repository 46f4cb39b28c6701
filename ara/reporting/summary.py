"""The main figures of a checkpoint, and the sentence that sums them up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ara.artifacts.checkpoint import RecoveryFigures, RoundingFigures
from ara.artifacts.evaluation import DENSE, UNIFORM, SpreadFigures
from ara.data.mixtures import Share, mixture_spec
from ara.evaluation.paired import NOISE
from ara.reporting.benchmark_parts import BenchCase, Benched
from ara.reporting.checkpoint_parts import Allocated, Base, Latency, Stored
from ara.reporting.evaluation_parts import ChatResult, Difference, Evaluated, HarnessResult, TextResult, ZeroShot

# A mean difference is significant from this many standard errors on, over at least this many windows: with few
# windows the standard error itself is uncertain.
_SURE = 3.0
_ENOUGH_WINDOWS = 4
# Texts that the verdict names, and tasks where there is no mean over tasks.
_NAMED = 2


def main_texts(evaluations: Iterable[Evaluated]) -> list[tuple[Evaluated, TextResult]]:
    """Return every text with the evaluation that has read most of it; of two equals, the later one."""
    best: dict[tuple[str, str | None], tuple[Evaluated, TextResult]] = {}
    for evaluation in evaluations:
        for result in evaluation.texts:
            key = result.task, result.sha256
            if key not in best or tokens_of(result) >= tokens_of(best[key][1]):
                best[key] = evaluation, result
    return list(best.values())


def longest_text(texts: Sequence[tuple[Evaluated, TextResult]]) -> tuple[Evaluated, TextResult] | None:
    """Return the text with most tokens read."""
    return max(texts, key=lambda item: tokens_of(item[1]), default=None)


def tokens_of(result: TextResult) -> int:
    """Return how many tokens a model has read of a text."""
    return result.windows * result.seq_len


def main_zero_shot(evaluations: Iterable[Evaluated]) -> tuple[Evaluated, ZeroShot] | None:
    """Return the mean over most zero-shot tasks, then over most questions, then the latest; ``None`` without one."""
    found = [(evaluation, evaluation.zero_shot) for evaluation in evaluations if evaluation.zero_shot]
    return max(enumerate(found), key=lambda item: (*_size(*item[1]), item[0]))[1] if found else None


def _size(evaluation: Evaluated, mean: ZeroShot) -> tuple[int, int]:
    """Return the number of tasks and of questions of a mean."""
    return len(mean.tasks), sum(row.examples for row in evaluation.harness if row.task in mean.tasks)


def main_case(bench: Benched) -> BenchCase | None:
    """Return the main case: generation at the smallest batch and longest context; ``None`` without a speed ratio."""
    timed = [case for case in bench.cases if bench.chosen in case.models and case.models[bench.chosen].ratio]
    return min(timed, key=lambda case: (case.kind != "decode", case.batch, -case.past), default=None)


def case_name(case: BenchCase) -> str:
    """Return a case of a benchmark in words."""
    batch = "" if case.batch == 1 else f", batch {case.batch}"
    if case.kind == "decode":
        return f"generating after {case.past:,} tokens{batch}"
    return f"reading {case.new:,} tokens{batch}"


def runtime_words(bench: Benched) -> tuple[str, ...]:
    """Return runtime, device, precision and threads of a benchmark."""
    runtime = {"torch": "torch", "onnx": "ONNX Runtime", "vllm": "vLLM"}.get(bench.backend, bench.backend)
    return runtime, *how_words(bench)


def how_words(run: Benched | Latency) -> tuple[str, ...]:
    """Return device, precision and threads of a measurement of time."""
    return run.device, run.precision, f"{run.threads} thread{'' if run.threads == 1 else 's'}"


def in_runtime(bench: Benched) -> str:
    """Return runtime, device, precision and threads of a benchmark as the end of a phrase."""
    where, *how = runtime_words(bench)
    return f" in {where} ({', '.join(how)})"


def machine_words(bench: Benched) -> tuple[str, ...]:
    """Return the recorded facts of a benchmark's machine: system, processor, cores, memory, GPUs."""
    known = bench.machine
    cores, memory = known.get("cores"), known.get("memory_bytes")
    words = (
        known.get("system"),
        known.get("processor"),
        f"{cores} core{'' if cores == 1 else 's'}" if cores else None,
        f"{memory / 2**30:.0f} GiB" if memory else None,
        *known.get("gpus", ()),
    )
    return tuple(word for word in words if word)


def runtime_key(bench: Benched) -> tuple[object, ...]:
    """Return what must be the same in two benchmarks to compare their speeds."""
    return bench.backend, bench.device, bench.precision, bench.threads


def differs(difference: Difference | None, count: int | None = None) -> bool | None:
    """Tell whether a difference of two models is significant; ``None`` where that is unknown.

    Args:
        difference: with a p-value or a standard error.
        count: number of windows that it is the mean of.
    """
    if difference is None:
        return None
    if difference.p is not None:
        return difference.p <= NOISE
    if not difference.stderr or (count is not None and count < _ENOUGH_WINDOWS):
        return None
    return abs(difference.difference) >= _SURE * difference.stderr


def title(base: Base, allocation: Allocated, checkpoint: Stored) -> str:
    """Return the headline of a report or card."""
    if checkpoint.densified:
        return f"{base.name}, cut by ARA to {allocation.model_keep:.1%} of its parameters and multiplied back"
    return f"{base.name}, compressed by ARA to {allocation.model_keep:.1%} of its parameters"


def verdict(
    base: Base,
    allocation: Allocated,
    checkpoint: Stored,
    evaluations: Sequence[Evaluated],
    benches: Sequence[Benched],
) -> str:
    """Return one sentence with size, quality and speed, compared with the dense model and uniform ranks."""
    dense, disk = checkpoint.dense_weight_bytes / 2**20, checkpoint.disk_bytes / 2**20
    cut = f"{base.name} with {allocation.model_keep:.1%} of its parameters"
    if checkpoint.densified:
        cut = f"{base.name} cut to {allocation.model_keep:.1%} of its parameters and multiplied back to all of them"
    parts = [f"{cut} ({disk:,.1f} instead of {dense:,.1f} MiB of weights on disk)"]
    quality = [_text(evaluation, result) for evaluation, result in main_texts(evaluations)[:_NAMED]]
    mean = main_zero_shot(evaluations)
    if mean is not None:
        quality.append(_change(f"mean accuracy over {len(mean[1].tasks)} zero-shot tasks", *mean))
    else:
        tasks = [(evaluation, task) for evaluation in evaluations for task in evaluation.harness]
        quality += [_change(f"{task.metric} on {task.task}", evaluation, task) for evaluation, task in tasks[:_NAMED]]
    chats = [(evaluation, chat) for evaluation in evaluations for chat in evaluation.chats]
    quality += [_silence(evaluation, chat) for evaluation, chat in chats[:_NAMED]]
    parts += quality or ["its quality was not measured"]
    parts.append(_speed(evaluations, benches) or "its speed was not measured")
    return "; ".join(parts) + "."


def _text(evaluation: Evaluated, result: TextResult) -> str:
    models = result.models
    words = f"perplexity on {result.task} {models[DENSE].perplexity:,.2f} → {models[evaluation.chosen].perplexity:,.2f}"
    if UNIFORM not in models:
        return words
    difference, note = result.over_uniform, ""
    beyond = differs(difference, result.windows)
    if beyond is False:
        note = ", no difference beyond the noise"
    elif beyond and difference is not None and difference.difference > 0:
        note = ", which is better"
    return f"{words} (uniform ranks: {models[UNIFORM].perplexity:,.2f}{note})"


def _silence(evaluation: Evaluated, result: ChatResult) -> str:
    models = {name: f"{row.empty:,}" for name, row in result.models.items()}
    words = f"empty answers to {result.conversations:,} conversations of {result.task} {models[DENSE]} → "
    words += models[evaluation.chosen]
    return words if UNIFORM not in models else f"{words} (uniform ranks: {models[UNIFORM]})"


def _change(what: str, evaluation: Evaluated, result: ZeroShot | HarnessResult) -> str:
    models = {name: share_text(row.value) for name, row in result.models.items()}
    words = f"{what} {models[DENSE]} → {models[evaluation.chosen]}"
    if differs(result.compared.get(DENSE)) is False:
        words += ", no significant difference"
    if UNIFORM not in models:
        return words
    noise = ", no significant difference" if differs(result.compared.get(UNIFORM)) is False else ""
    return f"{words} (uniform ranks: {models[UNIFORM]}{noise})"


def recovery_words(recovery: RecoveryFigures, after_rounding: bool = False) -> str:
    """Return how a checkpoint was repaired, in sentences.

    Args:
        recovery: its figures.
        after_rounding: whether whole numbers stayed.
    """
    kept = [level.level for level in recovery.levels if level.in_weights]
    whose = "After the rounding, its scales and unrounded" if after_rounding else "Its"
    what = f"repaired at the level{'s' * (len(kept) > 1)} {', '.join(kept)}" if kept else "not changed by any repair"
    text = mixture_spec([Share(part.name, part.share) for part in recovery.parts])
    words = (
        f"{whose} values were {what}, with {recovery.windows} × {recovery.seq_len} tokens of {text}. "
        f"On {recovery.held_out} held-out windows the divergence from the dense model went from {recovery.before:.4f} "
        f"to {recovery.after:.4f} nats per token, and the loss from {recovery.loss_before:.4f} to "
        f"{recovery.loss_after:.4f} (dense {recovery.dense_loss:.4f})."
    )
    for level in recovery.levels:
        if level.adapter is not None:
            words += (
                f" The level {level.level} is a LoRA adapter beside the weights: with it the divergence is "
                f"{level.adapter:.4f} nats per token."
            )
    return words if recovery.stopped is None else f"{words} The repair is not complete: {recovery.stopped}."


def rounding_words(rounding: RoundingFigures) -> str:
    """Return how a checkpoint was rounded, in sentences."""
    how = "each one for itself" if rounding.method == "nearest" else f"calibrated on {rounding.windows} windows of text"
    zero_points = "a zero point" if rounding.zero_points else "no zero point"
    counts = [f"{count} matrices have {bits} bits per weight" for bits, count in rounding.bits.items()]
    if rounding.embedding_bits is not None:
        counts.append(f"the embedding and the head have {rounding.embedding_bits} bits per weight")
    which = ", ".join(counts)
    return (
        f"{which[0].upper()}{which[1:]}, with a scale and {zero_points} per {rounding.block_words} weights; "
        f"rounding was {how}. On {rounding.held_out} held-out windows the loss went from {rounding.loss_before:.4f} to "
        f"{rounding.loss_after:.4f} nats per token."
    )


def share_text(value: float) -> str:
    """Return a metric's value: from 0 to 1 in per cent; any other, such as a perplexity, as a plain number."""
    return f"{value:.1%}" if 0 <= value <= 1 else f"{value:,.2f}"


def _speed(evaluations: Sequence[Evaluated], benches: Sequence[Benched]) -> str | None:
    speeds = []
    for bench in {runtime_key(bench): bench for bench in benches}.values():
        case = main_case(bench)
        ratio = case.models[bench.chosen].ratio if case else None
        if case and ratio:
            kind = "generation" if case.kind == "decode" else "reading"
            speeds.append(f"{kind} speed{in_runtime(bench)} {_times(ratio)}")
    if speeds:
        return ", ".join(speeds)
    longest = longest_text(main_texts(evaluations))
    reading = longest[1].models[longest[0].chosen].ratio if longest else None
    return f"reading speed {_times(reading)}" if reading else None


def _times(ratio: SpreadFigures) -> str:
    noise = ", no difference beyond the spread" if ratio.low <= 1 <= ratio.high else ""
    return f"{ratio.median:.2f} × dense ({ratio.low:.2f} – {ratio.high:.2f}{noise})"
