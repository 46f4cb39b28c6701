"""Tries a wheel like a user who has nothing else: ``python -m tests.wheel WHEEL --constraints FILE`` (``make dist``).

A new environment gets the wheel, outside of the repository. The demo model goes through ``ara run`` with little text,
and its checkpoint is loaded in the three ways. Nothing here imports ARA.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

_RUN = (
    "run demo --keep 0.9 --text python-docs --samples 8 --rank-samples 8 --held-out 4 --recover none "
    "--tasks python-docs --eval-seq-len 256 --max-windows 2"
)
# With the package; with transformers and the registration; with the code that the checkpoint carries.
_LOADS = {
    "ara.load": "import ara; model = ara.load(folder)",
    "import ara": "import ara, transformers; model = transformers.AutoModelForCausalLM.from_pretrained(folder)",
    "trust_remote_code": "import transformers; "
    "model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
}
_FORWARD = (
    "import sys; folder = sys.argv[1]; {load}; print(model.forward(model.dummy_inputs['input_ids']).logits.shape)"
)


def main() -> None:
    """Install, run, load; the first command that fails ends the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--constraints", type=Path, required=True, help="pins for pip")
    arguments = parser.parse_args()
    wheel, pins = arguments.wheel.resolve(strict=True), arguments.constraints.resolve(strict=True)
    with tempfile.TemporaryDirectory(prefix="ara-wheel-") as scratch:
        home = Path(scratch)
        venv.create(home / "venv", with_pip=True)
        python, ara = home / "venv/bin/python", home / "venv/bin/ara"
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", pins]
        # torch first: a later resolution might move between builds of several gigabytes.
        _do(home, *install, "torch")
        _do(home, *install, wheel)
        _do(home, ara, "--version")
        workspace = home / "workspace"
        _do(home, ara, *_RUN.split(), "--workspace", workspace)
        (folder,) = (workspace / "truncate").glob("*/checkpoint")
        for name, load in _LOADS.items():
            print(f"Loading the checkpoint: {name}", flush=True)
            _do(home, python, "-I", "-c", _FORWARD.format(load=load), folder)
        _do(home, ara, "generate", "Python is", "--max-new-tokens", "8", "--workspace", workspace)
    print(f"{wheel.name}: installed, ran the demo, and its checkpoint loads")


def _do(home: Path, *command: str | Path) -> None:
    """Run a command in ``home``, where nothing of the repository can be imported."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "ARA_", "VIRTUAL_ENV"))}
    env |= {key: os.environ[key] for key in ("ARA_CACHE_DIR",) if key in os.environ}
    done = subprocess.run(command, cwd=home, env=env, check=False)
    if done.returncode != 0:
        sys.exit(f"error: exit code {done.returncode}: {' '.join(map(str, command))}")


if __name__ == "__main__":
    main()
