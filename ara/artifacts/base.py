"""What the results of all kinds share: typed reading from a manifest, and writing as plain JSON data.

The results of a kind are a frozen dataclass whose fields are those of the manifest's ``results``, in their order. A
checksum says that a manifest is what somebody wrote, not that ara wrote it, so types are checked when it is read.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, cast

from pydantic import Field, Strict, TypeAdapter, ValidationError

from ara.errors import CorruptedError
from ara.jsonfile import dump, first_problem
from ara.workspace.manifest import Manifest, remake

if TYPE_CHECKING:
    from ara.workspace.view import StageView
    from ara.workspace.writer import StageWriter

P = TypeVar("P", bound="Part")

# Strict: the text "1" is no number, and 1 is no truth value.
Flag = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Least1 = Annotated[int, Strict(), Field(ge=1, lt=2**63)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Share = Annotated[float, Strict(), Field(gt=0, le=1)]
Rank = Least1 | Literal["dense"]
StoredDtype = Literal["float32", "bfloat16", "float16"]

# Metadata of a field that is not written while it is ``None``.
LEFT_OUT = {"left_out": True}
# The file in which evaluations, benchmarks and comparisons repeat their results, for other programs to read.
RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Part:
    """Base of everything that results consist of; names that this version does not know are ignored."""

    @classmethod
    def parse(cls, data: Any) -> Self:
        """Return what plain JSON data holds.

        Raises:
            ValidationError: a part is missing, or has another type.
        """
        part: Self = _adapter(cast(Hashable, cls)).validate_python(data)
        return part

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON data, in their order."""
        data: dict[str, Any] = _plain(self)
        return data


@dataclass(frozen=True)
class Settings(Part):
    """Base of the settings of a stage that later stages read; those of a stage that has none of them."""

    @classmethod
    def read(cls, source: StageView | Manifest) -> Self:
        """Return the settings that a finished stage was run with.

        Raises:
            CorruptedError: they have another form than this version writes.
        """
        return _parsed(cls, source, "config")


@dataclass(frozen=True)
class Results(Part):
    """Base of the results of one kind.

    Attributes:
        Settings: the settings of the stage that later stages read.
        vital: whether a result of another form counts as damaged. Where it does not, only tables and reports read the
            results, and they say which result they leave out.
    """

    Settings: ClassVar[type[Settings]] = Settings
    vital: ClassVar[bool] = True

    @classmethod
    def read(cls, source: StageView | Manifest) -> Self:
        """Return the results of a finished stage.

        Raises:
            CorruptedError: they have another form than this version writes.
        """
        return _parsed(cls, source, "results")

    @classmethod
    def problem(cls, manifest: Manifest) -> str | None:
        """Return in one line what is wrong with settings, results or tensors that later stages read, or ``None``."""
        if not cls.vital:
            return None
        for name, part, data in (("config", cls.Settings, manifest.config), ("results", cls, manifest.results)):
            try:
                part.parse(data)
            except ValidationError as error:
                return f"{name}: {first_problem(error)}"
        return None

    @classmethod
    def unfinished_problem(cls, results: Mapping[str, Any]) -> str | None:
        """Return what is wrong with those results of an unfinished stage that are there, or ``None``."""
        if not cls.vital:
            return None
        # Results that are not there yet are no problem, and neither is a table without entries.
        there = {one.name: results[one.name] for one in fields(cls) if results.get(one.name) not in (None, {})}
        try:
            cls.parse(there)
        except ValidationError as error:
            found = error.errors(include_url=False)
            wrong = [item for item in found if item["type"] != "missing" or len(item["loc"]) > 1]
            return f"results: {wrong[0]['msg']}" if wrong else None
        return None

    def write(self, stage: StageWriter) -> None:
        """Put the results into the manifest of a stage."""
        stage.results.update(self.plain())

    def write_file(self, stage: StageWriter) -> None:
        """Put the results into the manifest of a stage and into its ``results.json``.

        Raises:
            NumericalError: one is NaN or infinite.
        """
        text = dump(self.plain(), RESULTS_FILE, indent=1)
        (stage.folder / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
        self.write(stage)


def _parsed(part: type[P], source: StageView | Manifest, where: str) -> P:
    manifest = manifest_of(source)
    try:
        return part.parse(getattr(manifest, where))
    except ValidationError as error:
        raise CorruptedError(
            f"{manifest.key} was written in another form ({where}: {first_problem(error)})", remake(manifest, True)
        ) from None


def manifest_of(source: StageView | Manifest) -> Manifest:
    """Return the manifest of a result.

    Raises:
        CorruptedError: it cannot be read.
    """
    if isinstance(source, Manifest):
        return source
    if source.manifest is None:  # what it was made from is not what it seemed
        raise CorruptedError(source.why, source.remedy or None)
    return source.manifest


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        kept = ((one, getattr(value, one.name)) for one in fields(value))
        return {
            one.name: _plain(item) for one, item in kept if not (item is None and one.metadata.get("left_out", False))
        }
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@cache
def _adapter(part: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(type, part))
