"""``ara_export.json``: what an exported ONNX folder contains, checked whenever the folder is opened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ara.errors import ModelError
from ara.jsonfile import dump, read_object
from ara.layout_names import LayoutName
from ara.workspace.manifest import FileRecord, file_record
from ara.workspace.tensors import SHA256_PATTERN
from export.base import REPORT_FILE
from export.onnx.tolerance import Parity, Tolerance

GRAPH_FILE = "model.onnx"
DATA_FILE = f"{GRAPH_FILE}.data"
EXPORT_FORMAT: Literal[1] = 1

Provider = Literal["cpu", "cuda"]
Precision = Literal["fp32", "fp16", "int8"]
_AGAIN = "export again: ara export --force"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Source(_Part):
    """The checkpoint that was exported."""

    name: str
    sha256: str = Field(pattern=SHA256_PATTERN)


class DecoderFacts(_Part):
    """Facts about the model that are needed to run the graph.

    Attributes:
        family: ``model_type`` of the config.
        context: number of positions.
        eos: tokens that end a text.
        shared_caches: whether past and present of a cache can be one tensor, to which the attention appends in place.
    """

    family: str
    context: int = Field(ge=1)
    eos: tuple[int, ...]
    shared_caches: bool = False


class Proof(_Part):
    """The comparison with torch: its text, its tolerance, and the result of each case."""

    text: str
    tolerance: Tolerance
    cases: tuple[Parity, ...]


class Fallback(_Part):
    """The matrices that an int8 graph multiplies exactly, because with 8 bits it differed too much from torch.

    Their inputs are not rounded. Their weights are in 16 bits, or as the checkpoint stores them in few.

    Attributes:
        matrices: path → what 8 bits cost there, nats per token; the first one costs most per weight.
        candidates: number of matrices at which 8 bits round weights or inputs.
        weights: number of weights in ``matrices``.
        extra_bytes: by which the files are larger than without any of them; negative where rows are so short that
            blocks and their scales take more.
        kl: largest KL(torch ‖ ONNX) of a case without any of them, nats per token.
    """

    matrices: Mapping[str, float]
    candidates: int = Field(ge=1)
    weights: int = Field(ge=1)
    extra_bytes: int
    kl: float


class ExportReport(_Part):
    """The contents of ``ara_export.json``.

    Attributes:
        precision: of all weights that the checkpoint does not store in few bits, and of the inputs of products.
        rounded: number of matrices that it stores in few bits; the graph has the same numbers. Precision int8 rounds
            their inputs to 8 bits; in other precisions their products are exact.
        traced: whether transformers' exporter wrote the graph.
        expanded: number of products whose matrix of few bits ONNX Runtime expands to float when it loads the graph.
        fallback: ``None`` where no product had to be exact.
        parity: ``None`` where the graph was not compared.
    """

    format_version: Literal[1] = EXPORT_FORMAT
    source: Source
    precision: Precision
    execution_provider: Provider
    merge_shared_inputs: bool
    last_logits: bool
    rewritten: bool
    traced: bool = False
    layout: LayoutName
    ranks: Mapping[str, int]
    rounded: int = Field(0, ge=0)
    expanded: int = Field(0, ge=0)
    decoder: DecoderFacts
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str | None]
    fallback: Fallback | None = None
    parity: Proof | None = None

    def write(self, folder: Path) -> None:
        """Write the file into ``folder``."""
        text = dump(self, REPORT_FILE, indent=1)
        (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")


def graph_files(folder: Path) -> dict[str, FileRecord]:
    """Return size and checksum of the files that hold the graph."""
    return {name: file_record(folder / name) for name in (GRAPH_FILE, DATA_FILE) if (folder / name).is_file()}


def read_report(folder: Path) -> ExportReport:
    """Return ``ara_export.json`` of an exported folder, after comparing the sizes of its files.

    The checksums of the files are not verified: that would read gigabytes each time a model starts.

    Raises:
        ModelError: the folder is no export, the document is invalid, or a file is missing or cut short.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        raise ModelError(f"{folder} is not an export ({REPORT_FILE} is missing)", "make one: ara export --onnx")
    try:
        report = ExportReport.model_validate(read_object(path, _AGAIN))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ModelError(f"{path} is not what ara export writes ({place}: {first['msg']})", _AGAIN) from None
    for name, record in report.files.items():
        if name not in (GRAPH_FILE, DATA_FILE):
            raise ModelError(f"{path} names the file {name!r}", "do not use it: ara export writes no such file")
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != record.bytes:
            what = "is missing" if found is None else f"has {found:,} bytes"
            raise ModelError(
                f"{folder / name} {what}; {REPORT_FILE} says {record.bytes:,}", f"copy it again, or {_AGAIN}"
            )
    return report
