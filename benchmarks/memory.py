"""Models larger than memory: the stages of the pipeline under a hard limit, at a depth and at twice it.

    make bench-memory                                                  # 4 GB of weights with 2 GB of memory
    python benchmarks/memory.py --gigabytes 1.4 --limit 0.7 --hidden 512     # smaller

The model has LLaMA's architecture and random bfloat16 weights; it is written block by block. Every stage is a process
in a control group of its own, whose memory is limited; pages of files count too, and the system drops them when the
limit is reached. Where control groups cannot be written (no root), nothing is limited, and that is said. The peak is
that of memory which cannot be dropped (RssAnon), asked for every 20 ms: pages of files are as many as the limit allows.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ara.models.sources import resolve
from ara.models.weights import find_linears
from ara_cli.console import Column, Console
from ara_cli.formatting import bytes_text, seconds_text
from benchmarks.random_models import empty_model, write_model

if TYPE_CHECKING:
    from transformers import LlamaConfig

# Width of a head, heads per key head, and width of the MLP relative to the hidden width.
HEAD, GROUP, WIDER = 64, 4, 2.75
GROUPS = Path("/sys/fs/cgroup")
SECONDS_BETWEEN = 0.02


def llama(hidden: int, layers: int, vocabulary: int) -> LlamaConfig:
    """Return the config of a model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=int(WIDER * hidden),
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD // GROUP,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )


@contextlib.contextmanager
def limited(limit: int | None) -> Iterator[list[Path]]:
    """Yield the files that a process writes its number to, to live in a group of ``limit`` bytes.

    None without root, or without a limit.
    """
    if limit is None:
        yield []
        return
    root, name = (
        (GROUPS / "memory", "memory.limit_in_bytes") if (GROUPS / "memory").is_dir() else (GROUPS, "memory.max")
    )
    group = root / f"ara-bench-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield []
        return
    try:
        (group / name).write_text(str(limit))
        yield [group / "cgroup.procs"]
    except OSError:
        yield []
    finally:
        # The kernel moves the last pages of an ended process a moment later.
        for _ in range(50):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def run_stage(arguments: list[str], limit: int | None) -> tuple[float, int | None, bool]:
    """Run a stage.

    Args:
        arguments: of ``ara``.
        limit: bytes; ``None`` for none.

    Returns:
        Seconds, the peak of memory that cannot be dropped (``None`` if the stage was killed), and whether the limit was
        in force.
    """
    with limited(limit) as groups:

        def enter() -> None:
            for group in groups:
                group.write_text("0")

        begun, peak = time.monotonic(), 0
        process = subprocess.Popen([sys.executable, "-m", "ara_cli", *arguments], preexec_fn=enter)
        while process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    if line.startswith("RssAnon:"):
                        peak = max(peak, int(line.split()[1]) * 1024)
            time.sleep(SECONDS_BETWEEN)
        if process.returncode not in (0, -signal.SIGKILL):
            sys.exit(f"error: {arguments[0]} ended with {process.returncode} (its words are above)")
        return time.monotonic() - begun, None if process.returncode else peak, bool(groups)


def main() -> None:
    """Run all stages at two depths and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of weights at the first depth")
    parser.add_argument("--limit", type=float, default=2.0, help="memory of a stage, in GB")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model, a multiple of 256")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens per window")
    parser.add_argument("--level", default="closed", help="of recover: closed or block")
    parser.add_argument("--text", default="python-docs", help="calibration text")
    parser.add_argument("--workspace", type=Path, default=Path("bench-memory"), help="where to work")
    parser.add_argument("--keep-files", action="store_true", help="leave models and results on the disk")
    arguments = parser.parse_args()
    console, limit = Console(), int(arguments.limit * 1e9)
    # SmolLM2's, for the text.
    tokenizer = resolve("demo").load_tokenizer()
    one = empty_model(llama(arguments.hidden, 1, len(tokenizer)))
    block = torch.bfloat16.itemsize * sum(spec.dense_cost for spec in find_linears(one))
    depth = max(1, round(arguments.gigabytes * 1e9 / block))
    text = ["--samples", str(arguments.samples)]
    placed = ["--device", "cpu", "--dtype", "bfloat16"]
    stages = {
        "decompose": ["--text", arguments.text, *text, "--seq-len", str(arguments.seq_len), "--keep-moments", "no"],
        "allocate": ["--keep", "0.8", "--method", "sensitivity", *text, "--held-out", "4"],
        "truncate": [],
        "recover": ["--level", arguments.level, *text, "--held-out", "4"],
        "export": ["--onnx", "--precision", "fp16", "--execution-provider", "cpu", "--no-parity"],
    }
    rows: dict[str, list[str]] = {name: [name] for name in stages}
    peaks: dict[str, list[int | None]] = {name: [] for name in stages}
    titles = []
    for layers in (depth, 2 * depth):
        folder, workspace = arguments.workspace / f"model-{layers}", arguments.workspace / f"ws-{layers}"
        console.step(f"Writing a model of {layers} blocks")
        shutil.rmtree(folder, ignore_errors=True)
        size = write_model(folder, llama(arguments.hidden, layers, len(tokenizer)), torch.bfloat16)
        tokenizer.save_pretrained(folder)
        titles.append(f"{layers} blocks, {bytes_text(size)}")
        for name, options in stages.items():
            model = [str(folder), *placed] if name == "decompose" else placed if name in ("allocate", "recover") else []
            seconds, peak, held = run_stage([name, *model, *options, "-w", str(workspace)], limit)
            if not held:
                console.warn("control groups cannot be written here, so no limit is in force")
            peaks[name].append(peak)
            rows[name] += ["killed" if peak is None else bytes_text(peak), seconds_text(seconds)]
            if peak is None:  # the next stages need its result
                break
        if not arguments.keep_files:
            shutil.rmtree(arguments.workspace)
    for name, found in peaks.items():
        both = [peak for peak in found if peak is not None]
        rows[name] += [""] * (5 - len(rows[name])) + [f"{both[1] / both[0] - 1:+.1%}" if len(both) == 2 else ""]
    columns = [Column("stage", "left")]
    for title in titles:
        columns += [Column(f"peak, {title}"), Column("time")]
    console.table(f"limit {bytes_text(limit)}", [*columns, Column("growth of the peak")], list(rows.values()))


if __name__ == "__main__":
    main()
