"""Options that several commands share and that are not fields of a config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ara.bounds import shown
from ara.errors import UsageError
from ara.models.offload import Offload
from ara.names import check_name
from ara.pipeline import producers, stage_named
from ara.workspace.store import DEFAULT_ROOT
from ara_cli.values import existing_or_new_path
from export.targets import RUNTIMES, TARGETS, TORCH


def path_option(*flags: str, help: str, metavar: str, envvar: str | None = None) -> Any:
    """Return a Typer option for a path; ``~`` is expanded, and an impossible path is a usage error."""
    return typer.Option(*flags, help=help, metavar=metavar, envvar=envvar, parser=existing_or_new_path)


WorkspaceOption = Annotated[
    Path,
    path_option(
        "--workspace",
        "-w",
        envvar="ARA_WORKSPACE",
        help="folder that holds all results of one model",
        metavar="PATH",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="print only results, warnings and errors")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
ForceOption = Annotated[bool, typer.Option("--force", help="make the result again even if it exists")]
OffloadOption = Annotated[
    Offload,
    typer.Option(
        help="where weights are on a CPU: disk leaves them in their files, which are read when they are needed; none "
        "loads them; auto leaves them there if they take more than half of the free memory; other devices load them, "
        "and refuse disk"
    ),
]
NameOption = Annotated[str | None, typer.Option("--name", help="name of the result [default: made from the settings]")]
SourceOption = Annotated[
    Path | None,
    path_option(
        "--source", help="run this checkpoint folder or exported folder, without a workspace", metavar="FOLDER"
    ),
]
FactorsOption = Annotated[str | None, typer.Option(help="result of ara decompose to use [default: the latest]")]
MasksOption = Annotated[
    str | None,
    typer.Option(help="result of ara train-masks for the method ara [default: the one with the nearest budget]"),
]
RemoveOption = Annotated[float | None, typer.Option(help="fraction to remove instead: --remove 0.2 is --keep 0.8")]

# Options of the time of layers, in the order of --help.
LATENCY_OPTIONS = ("objective", "latency_tokens", "latency_backend", "latency_precision", "latency_threads")

WORKSPACE = Path(DEFAULT_ROOT)


@dataclass(frozen=True)
class SessionOptions:
    """Workspace and output; the last options of every command."""

    workspace: WorkspaceOption = WORKSPACE
    force: ForceOption = False
    offload: OffloadOption = "auto"
    quiet: QuietOption = False
    as_json: JsonOption = False


@dataclass(frozen=True)
class WhichCheckpoint:
    """Names a checkpoint. The text of ``Annotated[WhichCheckpoint, "to measure"]`` completes the help."""

    checkpoint: Annotated[
        str | None, typer.Option(help="result of ara truncate {use} [default: the latest checkpoint of any stage]")
    ] = None
    origin: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STAGE/NAME",
            help="checkpoint named by the stage that wrote it, such as truncate/ara-0.80; instead of --checkpoint",
        ),
    ] = None

    @property
    def given(self) -> dict[str, str | None]:
        """Flag → value."""
        return {"--checkpoint": self.checkpoint, "--from": self.origin}

    @property
    def asked(self) -> str | None:
        """NAME or STAGE/NAME of the checkpoint; ``None`` for the latest.

        Raises:
            UsageError: both options are given, or ``--from`` names no stage.
        """
        if self.origin is None:
            return self.checkpoint
        if self.checkpoint is not None:
            raise UsageError(
                f"--checkpoint {self.checkpoint} and --from {self.origin} are both given", "give one of them"
            )
        return stage_and_name("--from", self.origin)


def stage_and_name(flag: str, value: str) -> str:
    """Return the value of an option that names a checkpoint as STAGE/NAME.

    Raises:
        UsageError: it names no stage.
    """
    stage, slash, _ = value.partition("/")
    if not slash or stage_named(stage) is None:
        names = ", ".join(f"{name}/NAME" for name in producers("checkpoint"))
        raise UsageError(f"{flag} {shown(value)}: expected STAGE/NAME", f"checkpoints are called {names}")
    return value


@dataclass(frozen=True)
class WhichExport:
    """Names an export. The text of ``Annotated[WhichExport, "measures"]`` completes the help."""

    export: Annotated[
        str | None, typer.Option(help="result of ara export that --backend onnx {use} [default: the latest]")
    ] = None

    def asked(self, backend: str) -> str | None:
        """Return the name of the export; ``None`` for the latest.

        Raises:
            UsageError: an export is named although the backend runs none, or the name is invalid.
        """
        if self.export is not None and backend in (TORCH, *RUNTIMES.names()):
            others = " or ".join(f"--backend {name}" for name in TARGETS.names())
            raise UsageError(f"--export {self.export} is given, and --backend is {backend}", f"use {others}")
        if self.export is not None and backend in TARGETS:
            check_name(self.export)
        return self.export
