"""Which architectures of transformers go through ARA, and why the others do not: the results of ``make families``.

A tiny random model of every architecture was taken through the pipeline; ``tests/families/`` does it and writes
``families.json``, which this module reads. Nothing is decided by it: a model is refused for what is found in it.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ara import jsonfile

DATA = Path(__file__).with_name("families.json")

Outcome = Literal["works", "refused", "not built", "fails"]
Table = Literal["language", "multimodal"]


@dataclass(frozen=True)
class Family:
    """What came out for one model type of transformers.

    Attributes:
        model_type: as ``config.json`` names it.
        architecture: class of the model.
        outcome: *works*: dense, full-rank and compressed model agree as they should. *refused*: by ARA, see ``reason``.
            *not built*: no tiny model could be made. *fails*: neither works nor is refused.
        kinds: paths of the factorised layers inside their blocks, each once.
        dense: names of the other matrices, except embeddings and head. ``*`` replaces numbers. The parts outside of the
            language model are named as a whole.
        reason: of another outcome than *works*, in one line.
    """

    model_type: str
    architecture: str
    outcome: Outcome
    kinds: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    reason: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Family:
        """Return what :func:`dataclasses.asdict` made a dictionary of."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)


@dataclass(frozen=True)
class Families:
    """All results for one version of transformers.

    Attributes:
        transformers: the version.
        language: model types of ``AutoModelForCausalLM`` that are not in the other table, in the order of their names.
        multimodal: model types of ``AutoModelForMultimodalLM``, which read pictures or sound as well as text.
    """

    transformers: str
    language: tuple[Family, ...]
    multimodal: tuple[Family, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``families.json``."""
        return asdict(self)


@functools.cache
def known_families() -> Families:
    """Return the results that come with ARA."""
    found = jsonfile.read(DATA)
    tables = {key: tuple(map(Family.from_dict, found[key])) for key in ("language", "multimodal")}
    return Families(found["transformers"], **tables)
