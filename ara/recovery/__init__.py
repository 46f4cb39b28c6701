"""Levels of recovery: ranks stay, values are repaired; each level is one file and one line here.

Levels are in the order of their cost, in which ``ara recover`` runs them.
"""

from ara.registry import Entry, Registry

LEVELS = Registry(
    "recovery level",
    [
        Entry(
            "closed",
            "fits every layer to the inputs that it really gets, by linear algebra, without training",
            "ara.recovery.closed:Closed",
            "SAES-SVD, arXiv 2602.03051; AA-SVD, arXiv 2604.02119",
        ),
        Entry(
            "block",
            "trains every block to give the output of the dense block",
            "ara.recovery.block:Block",
            "AA-SVD, arXiv 2604.02119",
        ),
        Entry(
            "distill",
            "trains the whole model to give the predictions of the dense model",
            "ara.recovery.distill:Distill",
            "Hinton et al., arXiv 1503.02531",
        ),
    ],
)


def levels_to_run(level: str, only: bool) -> list[str]:
    """Return the levels that ``--level`` runs, in order: it and the ones before it, or it alone.

    Raises:
        UsageError: there is no such level.
    """
    LEVELS.entry(level)
    names = LEVELS.names()
    return [level] if only else names[: names.index(level) + 1]
