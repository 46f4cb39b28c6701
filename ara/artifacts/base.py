"""Base of the results of all kinds: typed reading from a manifest, and writing as plain JSON data.

The results of a kind are a frozen dataclass whose fields are those of the manifest's ``results``, in the same order. A
checksum does not prove that ara wrote a manifest, so types are checked on reading.
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

# Strict: the text "1" is not a number.
Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Least1 = Annotated[int, Strict(), Field(ge=1, lt=2**63)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Share = Annotated[float, Strict(), Field(gt=0, le=1)]
Rank = Least1 | Literal["dense"]
StoredDtype = Literal["float32", "bfloat16", "float16"]

# Metadata of a field that is omitted when it is ``None``.
LEFT_OUT = {"left_out": True}
# Copy of the results of evaluations, benchmarks and comparisons, for other programs.
RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Part:
    """Base of all parts of results; unknown names are ignored."""

    @classmethod
    def parse(cls, data: Any) -> Self:
        """Return the part that plain JSON data describes.

        Raises:
            ValidationError: a field is missing or has another type.
        """
        part: Self = _adapter(cast(Hashable, cls)).validate_python(data)
        return part

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON data, in their order."""
        data: dict[str, Any] = _plain(self)
        return data


@dataclass(frozen=True)
class Settings(Part):
    """Base of the settings that later stages read; used as it is where they read none."""

    @classmethod
    def read(cls, source: StageView | Manifest) -> Self:
        """Return the settings of a finished stage.

        Raises:
            CorruptedError: a field is missing or has another type.
        """
        return _parsed(cls, source, "config")


@dataclass(frozen=True)
class Results(Part):
    """Base of the results of one kind.

    Attributes:
        Settings: the settings that later stages read.
        vital: whether results of another form count as damaged. Results that are not vital are read by tables and
            reports only, which leave out and name those of another form.
    """

    Settings: ClassVar[type[Settings]] = Settings
    vital: ClassVar[bool] = True

    @classmethod
    def read(cls, source: StageView | Manifest) -> Self:
        """Return the results of a finished stage.

        Raises:
            CorruptedError: a field is missing or has another type.
        """
        return _parsed(cls, source, "results")

    @classmethod
    def problem(cls, manifest: Manifest) -> str | None:
        """Return in one line what is wrong with settings, results or tensors, or ``None``."""
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
        """Return what is wrong with the results so far of an unfinished stage, or ``None``."""
        if not cls.vital:
            return None
        # Results may be missing or empty as long as the stage is unfinished.
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
    if source.manifest is None:
        raise CorruptedError(source.why, source.remedy or None)
    return source.manifest


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        kept = ((one, getattr(value, one.name)) for one in fields(value))
        return {one.name: _plain(item) for one, item in kept if item is not None or "left_out" not in one.metadata}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@cache
def _adapter(part: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(type, part))
