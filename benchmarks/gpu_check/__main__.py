"""``python -m benchmarks.gpu_check``: runs the checks, writes the results, prints a summary."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ara.errors import AraError
from ara.models.placement import choose_placement
from ara_cli.console import Console
from ara_cli.formatting import seconds_text
from benchmarks.gpu_check import report
from benchmarks.gpu_check.checks import BUDGET, CHECKS
from benchmarks.gpu_check.outcome import Outcome
from benchmarks.gpu_check.running import CheckEntry, run_checks
from benchmarks.gpu_check.setting import FULL, REHEARSAL, Device, Setting


def main(words: Sequence[str] | None = None, checks: Sequence[CheckEntry] = CHECKS) -> int:
    """Run the checks and return the exit code: 1 if one failed, or if there is no GPU.

    Args:
        words: of the command line.
        checks: that exist.
    """
    parser = _parser(checks)
    arguments = parser.parse_args(words)
    if shutil.which(arguments.vllm_python) is None:
        parser.error(f"--vllm-python {arguments.vllm_python}: there is no such program")
    console = Console()
    try:
        choose_placement(arguments.device)
    except AraError as error:
        console.error(AraError(f"no check was run: {error} (--device cpu is a rehearsal)"))
        return 1
    with tempfile.TemporaryDirectory(prefix="ara-gpu-check-") as folder:
        setting = _setting(arguments.device, arguments.model, Path(folder))
        chosen = [check for check in checks if check.name in (arguments.only or [check.name])]
        console.step(f"Checking {setting.model} on {setting.device}: {seconds_text(arguments.seconds)} at most")
        results = report.document(setting, arguments.seconds)
        begun, outcomes = time.monotonic(), list[tuple[CheckEntry, Outcome]]()
        for check, outcome in run_checks(chosen, setting, arguments.seconds, arguments.vllm_python):
            console.fact(f"{check.title}: {outcome.status} ({seconds_text(outcome.seconds)})")
            outcomes.append((check, outcome))
            results["checks"][check.name] = {"title": check.title, **outcome.model_dump(mode="json")}
            results["seconds"] = time.monotonic() - begun
            report.write(arguments.results, results)
    report.summarise(console, outcomes)
    console.saved(arguments.results)
    return int(any(outcome.status == "failed" for _, outcome in outcomes))


def _setting(device: Device, model: str | None, folder: Path) -> Setting:
    """Return the setting; a rehearsal has a tiny model and small sizes."""
    if device == "cuda":
        return Setting(device=device, model=model or "demo", workspace=folder, sizes=FULL)
    if model is None:
        from tests.checkpoints import make_checkpoint

        model = str(make_checkpoint(folder / "model", "llama", None).folder)
    return Setting(device=device, model=model, workspace=folder, sizes=REHEARSAL)


def _parser(checks: Sequence[CheckEntry]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Does ARA compute on a GPU what it computes on a CPU, and how fast is the result?",
    )
    names = [check.name for check in checks]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal on tiny models")
    parser.add_argument("--only", choices=names, action="append", help="run this check alone; may be repeated")
    parser.add_argument("--model", help="to compress [default: demo; in a rehearsal a tiny random llama]")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="for all checks [default: %(default)s]")
    parser.add_argument(
        "--vllm-python",
        default=sys.executable,
        metavar="PYTHON",
        help="of an environment with vLLM [default: this one]",
    )
    parser.add_argument(
        "--results", type=Path, default=Path("build/gpu-check.json"), help="file of the results [default: %(default)s]"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
