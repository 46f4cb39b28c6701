"""Writes the pages of ``docs/reference/`` from the code: commands, stages, registries, aliases and families of models.

    python docs/reference.py            # write the pages
    python docs/reference.py --check    # exit 1 if a page differs from what would be written

Options come from the commands themselves. Their ranges come from the config field with the same description.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "docs" / "reference"
# Options that at least this many commands share are in one table at the top of the page.
_SHARED = 8
# What may come out for a family, and how many dense matrices of one are listed.
_OUTCOMES = ("works", "refused", "not built")
_NAMES = 4
_NOTE = "<!-- Written by docs/reference.py: change the code, then run `make reference`. -->"
_DEFAULT = re.compile(r"\s*\[default: (.+)\]$")
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "on or off"}
_LOW = {"minimum": "at least", "exclusiveMinimum": "above"}
_HIGH = {"maximum": "at most", "exclusiveMaximum": "below"}


def pages() -> dict[str, str]:
    """Return file name → text of every page."""
    return {
        "commands.md": commands(),
        "stages.md": stages(),
        "methods.md": registries(),
        "models.md": models(),
        "families.md": families(),
    }


def commands() -> str:
    """Return the page of all commands: usage, meaning, and a table of options with values and defaults."""
    from ara_cli.app import app

    group: Any = typer.main.get_command(app)
    found = {name: group.get_command(None, name) for name in group.list_commands(None)}
    ranges = _schemas()
    rows = {name: [_option(parameter, ranges) for parameter in command.params] for name, command in found.items()}
    everywhere = [row for options in rows.values() for row in options]
    shared = [row for row in dict.fromkeys(everywhere) if everywhere.count(row) >= _SHARED]
    header = ("option", "meaning", "values", "default")
    text = [
        "Every command prints its options with `--help`. A number outside its range is refused before any work begins.",
        "## Shared options",
        "Most commands take these options. The last line of each section names those that the command takes.",
        _table(header, shared),
    ]
    for name, command in found.items():
        own = [row for row in rows[name] if row not in shared]
        taken = [row[0] for row in rows[name] if row in shared]
        text += [f"## ara {name}", f"`{_usage(name, command)}`", _prose(command.help)]
        text += [_table(header, own)] if own else []
        text += [f"Shared options: {', '.join(taken)}."] if taken else []
    return _page("Commands", text)


def stages() -> str:
    """Return the page of the pipeline's stages, in their order."""
    from ara.pipeline import stages

    intro = (
        "Each stage is a command. It consumes results of some kinds and produces a result of one kind. `ara run` runs "
        "the stages that are neither optional nor aside, in this order; `--method ara` adds `train-masks`, and "
        "`--recover none` leaves out `recover`. *Optional* "
        "stages are not needed for a complete pipeline. Stages *aside* only measure or show results."
    )
    return _page("Stages", [intro, _records(stages(), leave_out=("run", "flow"))])


def registries() -> str:
    """Return the page of all registries: methods, layouts, texts, export targets."""
    text = [
        "`ara methods` prints decompositions, allocators and recovery levels. `-O NAME=VALUE` sets an option of a "
        "method."
    ]
    for registry in _registries():
        text += [
            f"## {registry.kind.capitalize()}s",
            _table(("name", "what it is", "source"), [(f"`{e.name}`", e.title, e.paper or "–") for e in registry]),
        ]
        for entry in registry:
            options = getattr(entry.load(), "Options", None)
            schema = options.model_json_schema().get("properties", {}) if options else {}
            if schema:
                rows = [(f"`{name}`", *_field(field)) for name, field in schema.items()]
                text += [f"Options of `{entry.name}`:", _table(("option", "meaning", "values", "default"), rows)]
    return _page("Methods, layouts, texts, targets", text)


def models() -> str:
    """Return the page of model aliases."""
    from ara.models.aliases import ALIASES

    intro = (
        "Aliases can be given instead of a hub id, local folder or GGUF file. `ara models` prints them. *Gated*: "
        "accept the licence on the model's page on the hub first, and run `hf auth login`."
    )
    return _page("Model aliases", [intro, _records(ALIASES.values())])


def families() -> str:
    """Return the page of all architectures that transformers has: what works, and why the others do not."""
    from ara.models.families import known_families

    known = known_families()
    text = [
        f"All model types of transformers {known.transformers} that predict the next token. `make families` takes a "
        "tiny random model of each through the pipeline with the default methods: decompose, allocate at keep 0.7, "
        "truncate, load.",
        "- *Works*: the loaded checkpoint gives the logits of the same factors in memory, within 10⁻⁶ of the largest. "
        "With all layers at full rank, a written and loaded checkpoint gives the logits of the dense model.\n"
        "- *Refused*: ARA stops with this reason and leaves nothing behind.\n"
        "- *Not built*: transformers makes no tiny model, so nothing is known.",
        "Of a model that also reads pictures or sound, the language model is compressed, and all passes read text "
        "alone. The last column names its other parts as a whole. A real model may have options in its config that the "
        "tiny one has not.",
    ]
    tables = (("Language models", known.language), ("Models that also read pictures or sound", known.multimodal))
    counts = [
        [title, *(str(sum(one.outcome == outcome for one in table)) for outcome in _OUTCOMES), str(len(table))]
        for title, table in tables
    ]
    text.append(_table(("", *_OUTCOMES, "all"), counts))
    for title, table in tables:
        text.append(f"## {title}")
        works = [one for one in table if one.outcome == "works"]
        if works:
            text.append(
                "These work. *Layers* counts kinds of factorised layers. Embeddings, head, norms and biases stay "
                "dense in all of them, and so do the weights of the last column."
            )
            rows = [
                (_code(one.model_type), one.architecture, str(len(one.kinds)), _shortly(one.dense)) for one in works
            ]
            text.append(_table(("model type", "class", "layers", "stays dense"), rows))
        for outcome in _OUTCOMES[1:]:
            rows = [(_code(one.model_type), one.architecture, one.reason) for one in table if one.outcome == outcome]
            if rows:
                text += [f"These are {outcome}:", _table(("model type", "class", "reason"), rows)]
    return _page("Families", text)


def _shortly(names: tuple[str, ...]) -> str:
    """Return the ends of names of matrices, each once."""
    ends = list(dict.fromkeys(name.rpartition(".*.")[2].removesuffix(".*") for name in names))
    more = f" and {len(ends) - _NAMES} more" if len(ends) > _NAMES else ""
    return ", ".join(map(_code, ends[:_NAMES])) + more or "–"


def _code(text: str) -> str:
    return f"`{text}`"


def _registries() -> list[Any]:
    """Return every registry of the code; found by searching the source for the lines that create them."""
    from ara.registry import Registry

    found: dict[int, Registry] = {}
    for top in ("ara", "export"):
        for path in sorted((REPOSITORY / top).rglob("*.py")):
            if re.search(r"^[A-Z_]+(?:: [^=]+)? = Registry\(", path.read_text(encoding="utf-8"), re.MULTILINE):
                parts = path.relative_to(REPOSITORY).with_suffix("").parts
                module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
                found |= {id(value): value for value in vars(module).values() if isinstance(value, Registry)}
    return list(found.values())


def _schemas() -> dict[str, dict[str, Any]]:
    """Return description → JSON schema of the field, for all fields of the configs that the commands have imported."""

    def classes(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
        for below in base.__subclasses__():
            yield from classes(below)
            if below.__module__.split(".")[0] in ("ara", "export") and below.__name__.endswith("Config"):
                yield below

    found: dict[str, dict[str, Any]] = {}
    for config in sorted(classes(BaseModel), key=lambda config: config.__name__):
        for field in config.model_json_schema().get("properties", {}).values():
            found.setdefault(field.get("description", ""), field)
    return found


def _option(parameter: Any, schemas: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Return the row of one option or argument of a command."""
    described = getattr(parameter, "help", "") or ""
    schema = schemas.get(described, {})
    meaning, values, default = _field({**schema, "description": described})
    if getattr(parameter, "is_flag", False):
        values = "–"
        default = "on" if parameter.default else "off"
    else:
        values = values if schema.get("type") != "object" and values != "text" else "–"
        if values == "–" and parameter.metavar and parameter.opts[0].startswith("-"):
            values = f"`{parameter.metavar}`".replace("|", "`, `")
        if parameter.default not in (None, (), []):
            given = parameter.default
            default = f"`{', '.join(map(str, given)) if isinstance(given, list | tuple) else given}`"
        if getattr(parameter, "multiple", False):
            meaning += " (may be repeated)" if "repeated" not in meaning else ""
    if parameter.required:
        default = "required"
    return f"`{_flag(parameter)}`", meaning, values, default


def _usage(name: str, command: Any) -> str:
    """Return the form of a command's line: arguments that are required, options, other arguments in brackets."""
    arguments = [parameter for parameter in command.params if not parameter.opts[0].startswith("-")]
    required = [_flag(one) for one in arguments if one.required]
    optional = [f"[{_flag(one)}]" for one in arguments if not one.required]
    return " ".join(["ara", name, *required, "[OPTIONS]", *optional])


def _flag(parameter: Any) -> str:
    """Return an option as it is typed, with its short and negative forms; an argument in capitals."""
    names = [*sorted(parameter.opts, key=len, reverse=True), *parameter.secondary_opts]
    return ", ".join(names) if names[0].startswith("-") else (parameter.metavar or names[0]).upper()


def _field(schema: dict[str, Any]) -> tuple[str, str, str]:
    """Return meaning, values and default of a field from its JSON schema."""
    meaning = schema.get("description", "")
    stated = _DEFAULT.search(meaning)
    default = schema.get("default")
    shown = f"`{default}`" if default not in (None, [], {}, "") else "–"
    return _DEFAULT.sub("", meaning), _values(schema), stated.group(1) if stated else shown


def _values(schema: dict[str, Any]) -> str:
    """Return the allowed values in words: choices, or the type with its range."""
    kinds = [kind for kind in [*schema.get("anyOf", ()), schema.get("items", {}), schema] if kind.get("type") != "null"]
    kind = next((kind for kind in kinds if "enum" in kind or kind.get("type") in _TYPES), {})
    if "enum" in kind:
        return ", ".join(f"`{value}`" for value in kind["enum"])
    words = _TYPES[kind["type"]] if "type" in kind else "–"
    low = [f"{word} {_number(kind[name])}" for name, word in _LOW.items() if name in kind]
    high = [f"{word} {_number(kind[name])}" for name, word in _HIGH.items() if name in kind]
    return " ".join([words, " and ".join(low + high)]).strip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def _records(records: Iterable[Any], leave_out: tuple[str, ...] = ()) -> str:
    """Return a table of dataclasses, a column per field."""
    records = list(records)
    names = [field.name for field in dataclasses.fields(records[0]) if field.name not in leave_out]
    rows = [[_cell(getattr(record, name), code=name == "name") for name in names] for record in records]
    return _table(names, rows)


def _cell(value: Any, code: bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return f"`{value}`" if code else str(value or "–")


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _prose(text: str) -> str:
    return " ".join(text.split())


def _page(title: str, parts: Iterable[str]) -> str:
    return "\n\n".join([f"# {title}", _NOTE, *parts]) + "\n"


def main() -> None:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only list the pages that differ")
    check = parser.parse_args().check
    different = []
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        path = FOLDER / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            different.append(f"docs/reference/{name}")
            if not check:
                path.write_text(text, encoding="utf-8")
    print("\n".join(f"{'differs' if check else 'written'}: {name}" for name in different) or "all pages are up to date")
    sys.exit(1 if check and different else 0)


if __name__ == "__main__":
    main()
