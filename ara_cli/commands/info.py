"""``ara models`` and ``ara methods``."""

from __future__ import annotations

from ara_cli.console import Column
from ara_cli.session import Session
from ara_cli.signature import command_line

_NO_WORKSPACE = ("workspace", "force", "offload")


@command_line(without=_NO_WORKSPACE)
def models(*, s: Session) -> None:
    """List the aliases of models; any hub id, folder or GGUF file works as well."""
    from ara.models.aliases import ALIASES
    from ara.models.families import known_families

    titles = ("alias", "repository", "parameters", "model_type", "licence", "note")
    rows = [tuple(vars(alias).values()) for alias in ALIASES.values()]
    columns = [Column(title.replace("_", " "), "left") for title in titles]
    s.console.table("Aliases (any hub id, local folder or GGUF file works as well)", columns, rows)
    s.console.fact("gated: accept the licence on the model's page on the hub first, and run `hf auth login`")
    known = known_families()
    works = sum(family.outcome == "works" for family in known.language)
    s.console.fact(
        f"{works} of {len(known.language)} model types of language models in transformers {known.transformers} work; "
        "docs/reference/families.md lists them"
    )
    s.console.result({"models": [dict(zip(titles, row, strict=True)) for row in rows]})


@command_line(without=_NO_WORKSPACE)
def methods(*, s: Session) -> None:
    """List decompositions, allocators and recovery levels with their options (-O NAME=VALUE)."""
    from ara.allocation import ALLOCATORS
    from ara.decomposition import DECOMPOSITIONS
    from ara.recovery import LEVELS

    found = {}
    for registry in (DECOMPOSITIONS, ALLOCATORS, LEVELS):
        rows, entries = [], []
        for entry in registry:
            kind = getattr(entry.load(), "Options", None)
            fields = kind.model_fields if kind else {}
            options = "; ".join(f"{name}={f.default}: {f.description}" for name, f in fields.items())
            rows.append((entry.name, entry.title, options or "none", entry.paper))
            entries.append({"name": entry.name, "title": entry.title, "paper": entry.paper, "options": list(fields)})
        columns = [Column(title, "left") for title in (registry.kind, "what it does", "options", "from")]
        s.console.table(f"{registry.kind.capitalize()}s", columns, rows)
        found[f"{registry.kind}s"] = entries
    s.console.result(found)
