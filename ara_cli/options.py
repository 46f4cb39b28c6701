"""Options that commands share and that set no field of a config."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ara.bounds import shown
from ara.errors import UsageError
from ara.names import check_name
from ara.pipeline import producers, stage_named
from ara.workspace.store import DEFAULT_ROOT
from ara_cli.values import existing_or_new_path
from export.targets import TARGETS, TORCH


def path_option(*flags: str, help: str, metavar: str, envvar: str | None = None) -> Any:
    """Return a Typer option for a path, in which ``~`` is written out; one that cannot be a path is a usage error."""
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
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="say nothing but results, warnings and errors")]
JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout")]
ForceOption = Annotated[bool, typer.Option("--force", help="do it again even if the same result is there")]
NameOption = Annotated[str | None, typer.Option("--name", help="name of the result [default: says method and keep]")]
FactorsOption = Annotated[str | None, typer.Option(help="decomposition to cut [default: the latest]")]
RemoveOption = Annotated[float | None, typer.Option(help="fraction to remove instead: --remove 0.2 is --keep 0.8")]

WORKSPACE = Path(DEFAULT_ROOT)


@dataclass(frozen=True)
class SessionOptions:
    """Where a command works and how it speaks; the last options of every command."""

    workspace: WorkspaceOption = WORKSPACE
    force: ForceOption = False
    quiet: QuietOption = False
    as_json: JsonOption = False


@dataclass(frozen=True)
class WhichCheckpoint:
    """Names the checkpoint of a command, which says what it is for: ``Annotated[WhichCheckpoint, "to measure"]``."""

    checkpoint: Annotated[str | None, typer.Option(help="result of ara truncate {use} [default: the latest]")] = None
    origin: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE/NAME", help="the same by stage and name, whichever stage wrote it"),
    ] = None

    @property
    def given(self) -> dict[str, str | None]:
        """Flag → value of both ways to name a checkpoint."""
        return {"--checkpoint": self.checkpoint, "--from": self.origin}

    @property
    def asked(self) -> str | None:
        """NAME or STAGE/NAME of the checkpoint; ``None`` for the latest.

        Raises:
            UsageError: it is named in both ways, or ``--from`` names no stage.
        """
        if self.origin is None:
            return self.checkpoint
        if self.checkpoint is not None:
            raise UsageError(
                f"--checkpoint {self.checkpoint} and --from {self.origin} are both given", "give one of them"
            )
        stage, slash, _ = self.origin.partition("/")
        if not slash or stage_named(stage) is None:
            names = ", ".join(f"{name}/NAME" for name in producers("checkpoint"))
            raise UsageError(f"--from {shown(self.origin)}: expected STAGE/NAME", f"checkpoints are called {names}")
        return self.origin


@dataclass(frozen=True)
class WhichExport:
    """Names the export that ``--backend`` runs; the command says its verb: ``Annotated[WhichExport, "measures"]``."""

    export: Annotated[str | None, typer.Option(help="export that --backend onnx {use} [default: the latest]")] = None

    def asked(self, backend: str) -> str | None:
        """Return the name of the export; ``None`` for the latest.

        Args:
            backend: what runs the model.

        Raises:
            UsageError: an export is named, and the backend is torch or no result can have that name.
        """
        if self.export is not None and backend == TORCH:
            others = " or ".join(f"--backend {name}" for name in TARGETS.names())
            raise UsageError(f"--export {self.export} is given, and --backend is torch", f"add {others}")
        if self.export is not None and backend in TARGETS:
            check_name(self.export)
        return self.export
