"""The measurements of ``benchmarks/bytes.py``, in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ara.allocation.forms import FORMS

# Sizes of the linear layers in per cent of bfloat16.
SIZES = (100, 60, 50, 40, 33, 28, 25, 22, 18)
# The rotated model, whose weights lie on no grid, and the model as it was published.
TWIN, ORIGINAL = "twin", "original"
FROZEN, RECOVERED = "frozen", "closed"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        model: :data:`TWIN` or :data:`ORIGINAL`.
        form: key of :data:`ara.allocation.forms.FORMS`.
        size: per cent; ``None`` for a form with a size of its own.
        level: :data:`FROZEN`, or :data:`RECOVERED` before rounding.
    """

    model: str
    form: str
    size: int | None
    level: str

    @property
    def key(self) -> str:
        """Key in the file of finished rows."""
        return f"{self.model}/{self.form}/{'-' if self.size is None else self.size}/{self.level}"

    @classmethod
    def parsed(cls, key: str) -> Row:
        """Return the row with a key."""
        model, form, size, level = key.split("/")
        return cls(model, form, None if size == "-" else int(size), level)


def wanted(sizes: Sequence[int], recovered: bool) -> Iterator[Row]:
    """List the measurements: dense models first, then all forms at every size, then the recovered ones.

    The original has only the dense models. Low-rank approximations do not depend on the coordinates, and what 4 bits
    lose on the original is no result.
    """
    fixed = [name for name, form in FORMS.items() if not form.sized]
    yield from (Row(model, name, None, FROZEN) for model in (TWIN, ORIGINAL) for name in fixed)
    for level in (FROZEN, RECOVERED) if recovered else (FROZEN,):
        for size in sizes:
            for name, form in FORMS.items():
                if form.sized and (form.ranks or level == FROZEN):
                    yield Row(TWIN, name, size, level)
