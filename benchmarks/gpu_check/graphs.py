"""Exported graphs in fp16: equal to torch, caches bound on the device, and generation by ONNX Runtime GenAI.

In a rehearsal the graphs run on the CPU, also in fp16.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ara.artifacts.checkpoint import CHECKPOINT
from ara.config import AllocateConfig, DecomposeConfig, QuantiseConfig, TruncateConfig
from ara.layout_names import DEFAULT_LAYOUT, LAYOUT_NAMES, LayoutName
from ara.models.checkpoint import load_tokenizer
from ara.progress import SILENT
from ara.stages.common import Run
from ara.stages.quantise import quantise
from ara.stages.run import run_pipeline
from ara.workspace.view import StageView
from benchmarks.gpu_check.outcome import Notes, NotRun
from benchmarks.gpu_check.setting import Device, Setting
from benchmarks.shapes import save_dense
from export.config import ExportConfig
from export.onnx.architecture import read_decoder
from export.onnx.proof import compare_graph, read_reference, text_windows
from export.onnx.runner import OnnxDecoder
from export.onnx.stored_weights import Checkpoint
from export.onnx.tolerance import TOLERANCES, all_misses
from export.onnx.writing import model_config
from export.stage import export_folder


@dataclass(frozen=True)
class Form:
    """A form of the model.

    Attributes:
        layout: of the low-rank layers; ``None``: dense.
        bits: per weight; ``None``: not rounded.
    """

    layout: LayoutName | None = None
    bits: Literal[4] | None = None


FORMS: dict[str, Form] = {"dense": Form(), "4 bits": Form(DEFAULT_LAYOUT, 4)}
FORMS |= {name: Form(name) for name in LAYOUT_NAMES}
PRECISION: Literal["fp16"] = "fp16"
_KEEP = 0.8
# Tokens per text in the comparison with torch, and of the prompt that is continued.
_PARITY_TOKENS, _PROMPT_TOKENS = 96, 24
# Least share of positions with the same most likely token as torch. So short a text has a few at which two tokens are
# nearly as likely, even in a graph whose divergence from torch is a hundredth of what is allowed.
_AGREEMENT = 0.9
_GENAI = {"cuda": "onnxruntime-genai-cuda", "cpu": "onnxruntime-genai"}


def parity(setting: Setting, notes: Notes) -> None:
    """Compare the graph of every form with torch, as ``ara export`` does."""
    tolerance = replace(TOLERANCES[PRECISION], agreement=_AGREEMENT)
    for form in FORMS:
        checkpoint, graph = Checkpoint(checkpoint_of(setting, form)), graph_of(setting, form)
        decoder = read_decoder(model_config(checkpoint.folder))
        cases = compare_graph(read_reference(checkpoint, graph, decoder, _PARITY_TOKENS, SILENT))
        notes.keep(form, [asdict(case) for case in cases])
        notes.misses += [f"{form}: {miss}" for miss in all_misses(cases, tolerance)]
    notes.detail = f"{', '.join(FORMS)}: within the tolerances of {PRECISION}"


def binding(setting: Setting, notes: Notes) -> None:
    """Decode with caches that stay on the device, and with caches that are passed on: the same logits."""
    decoder = OnnxDecoder(graph_of(setting, DEFAULT_LAYOUT))
    read = prompt(setting, DEFAULT_LAYOUT)[None]
    total, steps = read.shape[1] + setting.sizes.new_tokens, setting.sizes.new_tokens
    bound, past, new = decoder.bind(1, total), None, read
    differences: list[float] = []
    seconds = {"bound": 0.0, "passed on": 0.0}
    for length in range(read.shape[1], read.shape[1] + steps):
        begun = time.perf_counter()
        ours = decoder.step(bound, new, np.ones((1, length), np.int64))[0, -1].astype(np.float32)
        between = time.perf_counter()
        logits, past = decoder.forward(new, None, past)
        seconds["bound"] += between - begun
        seconds["passed on"] += time.perf_counter() - between
        theirs = logits[0, -1]
        differences.append(float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())))
        new = np.array([[theirs.argmax()]], np.int64)
    tolerance = TOLERANCES[PRECISION].difference
    assert tolerance is not None
    # Unlike max() of Python, this keeps a NaN.
    notes.within("largest difference of a logit, as a share", float(np.max(differences)), tolerance)
    devices = sorted({cache.device_name() for cache in bound.get_outputs()[1:]})
    notes.require("devices of the caches", devices, [decoder.provider])
    notes.keep("milliseconds per step", {name: 1000 * value / steps for name, value in seconds.items()})


def genai(setting: Setting, notes: Notes) -> None:
    """Let GenAI continue a prompt: every token must be the most likely one of our own run of the graph, or nearly so.

    Raises:
        NotRun: the package for this device is not installed.
    """
    package = _GENAI[setting.device]
    try:
        notes.keep("version", metadata.version(package))
    except metadata.PackageNotFoundError:
        raise NotRun(f"{package} is not installed: pip install --no-deps {package}") from None
    folder = graph_of(setting, DEFAULT_LAYOUT)
    read = prompt(setting, DEFAULT_LAYOUT)
    tokens = _continued_by_genai(folder, read.tolist(), setting.sizes.new_tokens)
    logits, _ = OnnxDecoder(folder).forward(np.array([[*read, *tokens[:-1]]], np.int64))
    rows = logits[0, len(read) - 1 :]
    below = float((rows.max(-1) - rows[np.arange(len(tokens)), tokens]).max())
    tolerance = TOLERANCES[PRECISION].difference
    assert tolerance is not None
    notes.keep("tokens", len(tokens))
    scale = max(1.0, float(np.abs(rows).max()))
    notes.within("how far a token is below the most likely one, as a share", below / scale, tolerance)


def _continued_by_genai(folder: Path, read: list[int], new_tokens: int) -> list[int]:
    """Return the tokens that GenAI generates greedily after a prompt; at least one."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(read) + new_tokens, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(read)
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


def checkpoint_of(setting: Setting, form: str) -> Path:
    """Return the folder of the model in a form of :data:`FORMS`; it is made if it does not exist."""
    wanted = FORMS[form]
    if wanted.layout is None:
        return save_dense(setting.workspace / "dense", setting.model)
    run = Run(setting.workspace / "forms")
    placed: dict[str, Any] = {"device": setting.device, "dtype": "float32"}
    # The factors need no text, but the rounding reads that of the decomposition.
    read: dict[str, Any] = {
        "text": setting.text,
        "samples": setting.sizes.samples,
        "seq_len": setting.sizes.seq_len,
    }
    decomposition = DecomposeConfig(
        model=setting.model, method="plain", exclude=setting.sizes.exclude, **read, **placed
    )
    ranks = AllocateConfig(keep=_KEEP, method="uniform", guard=False, layout=wanted.layout, **placed)
    view: StageView = run_pipeline(decomposition, [ranks], {"truncate": TruncateConfig()}, run)[-1]
    if wanted.bits is not None:
        rounding = QuantiseConfig(bits=wanted.bits, method="nearest", samples=2, held_out=2, tolerance=10, **placed)
        view = quantise(rounding, run, checkpoint=view.key)
    return view.path / CHECKPOINT


def graph_of(setting: Setting, form: str) -> Path:
    """Return the exported graph of one form, for the device; it is made if it does not exist."""
    output = setting.workspace / "graphs" / form.replace(" ", "-")
    if not (output / "ara_export.json").exists():
        provider: Device = setting.device
        config = ExportConfig(precision=PRECISION, execution_provider=provider, parity=False)
        export_folder(config, Run(setting.workspace), checkpoint_of(setting, form), output)
    return output


def prompt(setting: Setting, form: str) -> np.ndarray:
    """Return the beginning of the text, as token ids (t) int64."""
    tokenizer = load_tokenizer(graph_of(setting, form))
    ids: np.ndarray = text_windows(tokenizer, "evaluation", 1, _PROMPT_TOKENS)[0].numpy()
    return ids
