"""The measurements of ``benchmarks/bytes.py``, in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ara.allocation.forms import FORMS

# Sizes of the linear layers in per cent of bfloat16.
SIZES = (100, 60, 50, 40, 33, 28, 25, 22, 18)
# The rotated model, whose weights lie on no grid, and the model as it was published.
TWIN, ORIGINAL = "twin", "original"
FROZEN, RECOVERED, DISTILLED = "frozen", "closed", "distilled"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        model: :data:`TWIN` or :data:`ORIGINAL`.
        form: key of :data:`ara.allocation.forms.FORMS`.
        size: per cent; ``None`` for a form with a size of its own.
        level: :data:`FROZEN`; :data:`RECOVERED` before rounding; or :data:`DISTILLED`, also repaired after rounding.
    """

    model: str
    form: str
    size: int | None
    level: str

    @property
    def key(self) -> str:
        """Key in the file of finished rows."""
        return f"{self.model}/{self.form}/{'-' if self.size is None else self.size}/{self.level}"

    @property
    def allocation(self) -> str:
        """Name of its ranks, and of the checkpoint that is truncated to them."""
        return "dense" if self.size is None else f"{self.form}-{self.size}"

    def rounded(self, level: str) -> str:
        """Return the name of its rounded checkpoint.

        Args:
            level: before the rounding.
        """
        return f"{self.form}-{self.size or 'dense'}-{level}"

    @classmethod
    def parsed(cls, key: str) -> Row:
        """Return the row with a key."""
        model, form, size, level = key.split("/")
        return cls(model, form, None if size == "-" else int(size), level)


def level_at(name: str, level: str) -> str:
    """Return the level of a form in the table of a level: one that it cannot have is left out.

    Without ranks nothing is repaired before rounding. A form that always has 16 bits is not repaired after it.
    """
    form = FORMS[name]
    if level == DISTILLED and form.bits != (16,):
        return DISTILLED
    return FROZEN if level == FROZEN or not form.ranks else RECOVERED


def wanted(sizes: Sequence[int], recovered: bool, distilled: bool = False) -> Iterator[Row]:
    """List the measurements: dense models first, then all forms at every size, then the recovered ones.

    The original has only the dense models. Low-rank approximations do not depend on the coordinates, and what 4 bits
    lose on the original is no result.

    Args:
        sizes: per cent.
        recovered: whether models with ranks are also measured with a repair.
        distilled: whether rounded models are also measured with a repair after rounding.
    """
    fixed = [name for name, form in FORMS.items() if not form.sized]
    yield from (Row(model, name, None, FROZEN) for model in (TWIN, ORIGINAL) for name in fixed)
    for level in (FROZEN, RECOVERED) if recovered else (FROZEN,):
        for size in sizes:
            for name, form in FORMS.items():
                if form.sized and (form.ranks or level == FROZEN):
                    yield Row(TWIN, name, size, level)
    if distilled:
        rounded = [name for name in FORMS if level_at(name, DISTILLED) == DISTILLED]
        yield from (Row(TWIN, name, None, DISTILLED) for name in rounded if not FORMS[name].sized)
        yield from (Row(TWIN, name, size, DISTILLED) for size in sizes for name in rounded if FORMS[name].sized)
