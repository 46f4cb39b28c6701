"""START HERE: the stages in their order, what each reads and what it writes.

::

    model + text ──decompose──▶ factors ──(train-masks)──▶ masks
                                   │                         │
                                   ├──────allocate ◀─────────┘
                                   ▼          │
                                truncate ◀── ranks
                                   │
                              checkpoint ──▶ eval, export

The README's tree, ``ara --help`` and the folders of a workspace show the same order; a test holds them together.
Every stage is a function ``stage(config, run, ...)`` in :mod:`ara.stages` that returns the folder it wrote.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One line of the pipeline.

    Attributes:
        name: of the command and of the workspace folder.
        title: one line for ``ara --help``.
        reads: what it is made from.
        writes: what its folder holds.
        after: the stage that it builds on, ``None`` for the first.
        optional: whether the pipeline is complete without it.
    """

    name: str
    title: str
    reads: str
    writes: str
    after: str | None
    optional: bool = False


STAGES: tuple[Stage, ...] = (
    Stage("decompose", "Factor every linear layer once", "model, text", "factors", None),
    Stage("train-masks", "Learn which ranks matter", "factors, text", "masks", "decompose", optional=True),
    Stage("allocate", "Give every layer a rank under one budget", "factors, text", "ranks", "decompose"),
    Stage("truncate", "Write the compressed checkpoint", "factors, ranks, model", "checkpoint", "allocate"),
    Stage("eval", "Measure dense, uniform and chosen side by side", "checkpoint, text", "results", "truncate"),
    Stage("export", "Write the model for another runtime", "checkpoint", "ONNX graph", "truncate", optional=True),
)

# Stage → the stages whose results its own may be made from. Nothing is made from itself, so a result that says
# otherwise is not ours; a test holds that.
MADE_FROM: dict[str, tuple[str, ...]] = {
    "decompose": (),
    "train-masks": ("decompose",),
    "allocate": ("decompose", "train-masks"),
    "truncate": ("allocate", "decompose"),
    "export": ("truncate",),
    "eval": ("truncate", "decompose", "export"),
    "compare": ("decompose", "train-masks"),
    "bench": ("truncate", "decompose", "export"),
    "report": ("decompose", "train-masks", "allocate", "truncate", "export", "eval", "compare", "bench"),
}
