"""What all parts of the report have in common. :mod:`ara.reporting.document` states their units."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """Base of all parts: immutable, without unknown names, without NaN; so are the dataclasses that it holds."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        defer_build=True,
        allow_inf_nan=False,
        from_attributes=True,
        revalidate_instances="always",
    )

    @classmethod
    def from_source(cls, source: object, **others: Any) -> Self:
        """Return the part with the fields ``others``; the remaining fields are attributes of ``source``.

        Raises:
            ValidationError: a field has another type.
        """
        same = {name: getattr(source, name) for name in cls.model_fields if name not in others}
        return cls.model_validate({**same, **others})
