"""What is drilled: one command per stage, on a tiny model, each in the folder that the commands before it have left."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

_PLACED = "--device cpu --dtype float32"
_TUNED = f"--samples 6 --held-out 3 {_PLACED}"
_TEXT = "file:story.jsonl"


@dataclass(frozen=True)
class Scenario:
    """One command, begun in a folder with ``model``, ``story.jsonl`` and the workspace ``ws``.

    Attributes:
        name: of the scenario.
        line: the command, without its workspace.
        needs: scenarios that come before it.
        again: it is run on its own finished result, which it replaces.
        keeps_on_interrupt: Ctrl+C makes the best so far the result, and the command ends well.
    """

    name: str
    line: str
    needs: tuple[str, ...] = ()
    again: bool = False
    keeps_on_interrupt: bool = False

    @property
    def words(self) -> list[str]:
        """The arguments of ``ara``."""
        words = shlex.split(self.line)
        return words if "--source" in words else [*words, "-w", "ws"]


# Whether moments are kept must not depend on the disk that is made small.
_FIRST = f"--text {_TEXT} --samples 12 --seq-len 48 --keep-moments yes"
_DECOMPOSE = f"decompose model {_FIRST} --moment-memory 1e-6 {_PLACED}"
_EVAL = (
    f"eval --checkpoint energy-0.70 --tasks {_TEXT} --seq-len 64 --max-windows 2 --prompt 'The baker' "
    f"--max-new-tokens 4 {_PLACED}"
)
_BENCH = f"bench --checkpoint energy-0.70 --prefill 7 --decode 9 --rounds 6 {_PLACED}"
_GENERATE = f"generate 'The baker' --max-new-tokens 4 --checkpoint energy-0.70 {_PLACED}"
_REPORT = "report --checkpoint energy-0.70"
_CUT = ("decompose", "allocate", "truncate")
# In the order in which they are run once, to make what later ones begin with.
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("run", f"run model {_FIRST} --rank-samples 6 --held-out 3 --keep 0.8 "
            f"--method sensitivity --tasks {_TEXT} --eval-seq-len 64 --max-windows 2 {_PLACED}"),
        Scenario("decompose", _DECOMPOSE),
        Scenario("train-masks", f"train-masks --keep 0.8 --keep 0.6 --steps 3 --batch 2 --check-every 2 {_TUNED}",
            ("decompose",), keeps_on_interrupt=True),
        Scenario("allocate", "allocate --keep 0.7 --method energy", ("decompose",)),
        Scenario("allocate sensitivity", f"allocate --keep 0.75 --method sensitivity {_TUNED}", ("decompose",)),
        Scenario("allocate ara", f"allocate --keep 0.8 --method ara {_TUNED}", ("decompose", "train-masks")),
        Scenario("truncate", "truncate --allocation energy-0.70 --max-shard-size 200KB", ("decompose", "allocate")),
        Scenario("eval", _EVAL, _CUT),
        Scenario("export", "export --checkpoint energy-0.70 --execution-provider cpu", _CUT),
        Scenario("export folder", "export --source ws/truncate/energy-0.70/checkpoint --output out "
            "--execution-provider cpu --no-parity --overwrite", _CUT),
        Scenario("compare", f"compare --keep 0.7 --methods uniform,energy,sensitivity --tasks {_TEXT} "
            f"--eval-seq-len 64 --max-windows 2 {_TUNED}", ("decompose",)),
        Scenario("compare sizes", f"compare --size 300KB,150KB --block 16 --embedding-bits 8 --recover block {_TUNED}",
            ("decompose",)),
        Scenario("bench", _BENCH, _CUT),
        Scenario("report", f"{_REPORT} --output page.html", (*_CUT, "eval", "bench")),
        Scenario("recover", "recover --checkpoint energy-0.70 --level distill --samples 8 --held-out 3 --batch-size 4 "
            f"--block-epochs 1 --steps 3 --batch 4 --check-every 1 --save-every 1 {_PLACED}", _CUT,
            keeps_on_interrupt=True),
        Scenario("quantise", "quantise --checkpoint energy-0.70 --bits 4 --samples 8 --held-out 3 --tolerance 9 "
            f"{_PLACED}", _CUT),
    )
}  # fmt: skip

# What is run where everything is finished, to read what has been damaged.
READERS = {
    reader.name: reader
    for reader in (
        Scenario("decompose", f"{_DECOMPOSE} --name second", ("decompose",)),
        Scenario("allocate", "allocate --keep 0.6 --method energy", ("allocate",)),
        Scenario("allocate sensitivity", f"allocate --keep 0.65 --method sensitivity {_TUNED}",
            ("allocate sensitivity",)),
        Scenario("allocate ara", f"allocate --keep 0.6 --method ara {_TUNED}", ("allocate ara",)),
        Scenario("truncate", "truncate --allocation energy-0.70 --name second", ("truncate",)),
        Scenario("eval", f"{_EVAL} --name second", ("eval",)),
        Scenario("eval onnx", f"{_EVAL} --name second --backend onnx", ("eval", "export")),
        Scenario("export", "export --checkpoint energy-0.70 --execution-provider cpu --no-parity --name second",
            ("export",)),
        Scenario("bench", f"{_BENCH} --name second", ("bench",)),
        Scenario("generate", _GENERATE, ("truncate",)),
        Scenario("generate onnx", f"{_GENERATE} --backend onnx", ("export",)),
        Scenario("report", f"{_REPORT} --name second", ("report",)),
        Scenario("report again", _REPORT, ("report",)),
    )
}  # fmt: skip


def again(scenario: Scenario) -> Scenario:
    """Return the same command on its own result, which it makes anew."""
    force = "" if "--overwrite" in scenario.line else " --force"
    return Scenario(f"{scenario.name} again", scenario.line + force, (*scenario.needs, scenario.name), again=True)


SCENARIOS |= {
    scenario.name: scenario
    for scenario in map(again, [SCENARIOS[name] for name in ("decompose", "allocate", "truncate", "export folder")])
}
