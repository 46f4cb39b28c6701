"""The model card (README.md) of a compressed checkpoint: what was done, and the numbers."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

from ara.calibration.texts import FILE_PREFIX
from ara.config import Layout
from ara.manifest import Manifest

# Options whose value is a path however it is written, and those whose value is never one.
_PATH_OPTION = re.compile(r"-[a-z]*w|--workspace|--ranks")
_PROSE_OPTION = "--prompt"
# NAME=VALUE, --option=VALUE, or a value glued to the short option of the workspace, which may follow flags: -qwDIR.
_GLUED = re.compile(r"([\w-]+=|-[a-z]*?w)(.+)", re.DOTALL)


def model_card(
    decomposition: Manifest, allocation: Manifest, results: dict[str, Any], dtype: str, layout: Layout = "factors"
) -> str:
    """Return the card as Markdown with the front matter that model hubs read.

    Args:
        decomposition: manifest of the factors.
        allocation: manifest of the ranks.
        results: figures of the truncation: parameters, bytes, layers.
        dtype: precision of the stored weights.
        layout: of the low-rank layers.
    """
    model = decomposition.model
    base = display_name(model)
    front = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- ara",
        "- svd",
        "- low-rank",
    ]
    if model["kind"] == "hub":
        front.append(f"base_model: {base}")
    sections = [
        "\n".join([*front, "---"]),
        f"# {base}, compressed by ARA to {results['model_keep']:.1%} of its parameters",
        _what(decomposition, allocation, results, base, layout),
        _numbers(decomposition, allocation, results, dtype),
        _ranks(allocation),
        _loading(results),
        _reproduce(decomposition, allocation),
    ]
    return "\n\n".join(sections) + "\n"


def display_name(model: dict[str, Any]) -> str:
    """Return how a shared file should call a model: a hub id, or a name without the folders of this machine."""
    location = str(model["location"])
    return location if model["kind"] in ("hub", "wheel") else Path(location).name


def shared_command(command: str, model: dict[str, Any]) -> str:
    """Return a command as a shared file should show it: every path on this machine reduced to its last component.

    Args:
        command: as it was typed.
        model: the model of the manifest; its hub id looks like a path and stays.
    """
    try:
        words = shlex.split(command)
    except ValueError:  # a library call may say anything
        words = command.split()
    shared: list[str] = []
    for before, word in pairwise(["", *words]):
        glued = _GLUED.fullmatch(word)
        if glued is None:
            shared.append(_shared_value(word, before, model))
        else:
            shared.append(glued[1] + _shared_value(glued[2], glued[1].rstrip("="), model))
    return command if shared == words else shlex.join(shared)


def _shared_value(value: str, option: str, model: dict[str, Any]) -> str:
    """Return the value of ``option`` (or whatever word came before it) without folders of this machine."""
    if option == _PROSE_OPTION:
        return value
    texts = value.split(",")  # --tasks takes several
    if any(text.startswith(FILE_PREFIX) for text in texts):
        return ",".join(_shared_text(text) for text in texts)
    if _PATH_OPTION.fullmatch(option) or _is_local(value, model):
        return Path(value).name or value
    return value


def _is_local(value: str, model: dict[str, Any]) -> bool:
    if "/" not in value:
        return False
    if model["kind"] == "hub" and value == model["location"]:
        return False
    if value.startswith(("/", "./", "../", "~")) or value == model["requested"]:
        return True
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # too long for a path, or with characters that no path has
        return False


def _shared_text(spec: str) -> str:
    """Return the name of a text, that of a file of one's own without its folders."""
    prefix = FILE_PREFIX if spec.startswith(FILE_PREFIX) else ""
    return prefix + Path(spec.removeprefix(prefix)).name


def _what(decomposition: Manifest, allocation: Manifest, results: dict[str, Any], base: str, layout: Layout) -> str:
    config, figures = decomposition.config, decomposition.results
    text = (
        f"{figures['windows'][0]} × {figures['windows'][1]} tokens of {_shared_text(config['text'])}"
        if figures["windows"]
        else "none"
    )
    from_file = allocation.config.get("ranks_sha256") is not None
    pivoted = "stored as some of their rows, the others as combinations of those"
    shape = {"factors": "stored as two thin matrices each", "pivoted": pivoted}[layout]
    shape = "multiplied back to dense weights" if results["densified"] else shape
    return (
        f"{results['low_rank_layers']} linear layers of `{base}` were factorised by SVD and are {shape}; "
        f"{results['dense_layers']} stay dense, embeddings and head are untouched. No weight was trained.\n\n"
        f"- decomposition: `{config['method']}`, calibration text: {text}\n"
        f"- ranks: `{allocation.name}` (`{allocation.config['method'] if not from_file else 'from a file'}`)\n"
        "- evaluation: run `ara eval` in the workspace; this card holds no quality figure that was not measured"
    )


def _numbers(decomposition: Manifest, allocation: Manifest, results: dict[str, Any], dtype: str) -> str:
    figures = allocation.results
    rows = [
        ("parameters of the factorised layers", "linear_parameters_dense", "linear_parameters", "linear_keep"),
        ("parameters of the whole model", "model_parameters_dense", "model_parameters", "model_keep"),
    ]
    lines = ["| | dense | compressed | kept |", "|---|---:|---:|---:|"]
    lines += [f"| {title} | {figures[a]:,} | {figures[b]:,} | {figures[c]:.2%} |" for title, a, b, c in rows]
    dense, stored = results["dense_weight_bytes"], results["disk_bytes"]
    lines.append(
        f"| weights on disk, MiB ({dtype}) | {dense / 2**20:,.1f} | {stored / 2**20:,.1f} | {stored / dense:.2%} |"
    )
    return "\n".join(lines)


def _ranks(allocation: Manifest) -> str:
    lines = ["| layers | shape (out × in) | dense | rank min / mean / max | kept |", "|---|---|---:|---:|---:|"]
    for kind, row in allocation.results["kinds"].items():
        low = "–" if row["rank_mean"] is None else f"{row['rank_min']} / {row['rank_mean']:.0f} / {row['rank_max']}"
        m, n = row["shape"]
        lines.append(f"| `{kind}` | {m} × {n} | {row['dense']} of {row['layers']} | {low} | {row['keep']:.1%} |")
    return "\n".join(lines)


def _loading(results: dict[str, Any]) -> str:
    if results["densified"]:
        return "Loads like any dense checkpoint, and is as large as one."
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "import ara  # pip install ara-svd; or leave this out and pass trust_remote_code=True\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n'
        "```"
    )


def _reproduce(decomposition: Manifest, allocation: Manifest) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in decomposition.versions.items())
    model = decomposition.model
    typed = (decomposition.command, allocation.command)
    commands = "\n".join(dict.fromkeys(shared_command(command, model) for command in typed))
    return (
        f"Made by\n\n```\n{commands}\n```\n\n"
        f"with {versions}; seed {decomposition.seed}; base model fingerprint `{model['fingerprint']}`."
    )
