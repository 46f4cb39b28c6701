"""Options come from the configs: every field has one, with the field's words and default, and sets that field."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from ara.config import AllocateConfig, CompareConfig, DecomposeConfig, EvalConfig, StageConfig
from ara.config.flags import Flag, flag_of
from ara.errors import UsageError
from ara_cli.app import COMMANDS, app
from ara_cli.fields import FieldOption, Only
from ara_cli.options import WhichCheckpoint, WhichExport
from ara_cli.session import Session
from ara_cli.signature import Maker, command_line

GROUP: Any = typer.main.get_command(app)
OPTIONS = {name: {option.name: option for option in GROUP.get_command(None, name).params} for name in COMMANDS}


def configs(command: str) -> list[tuple[type[StageConfig], Only | None]]:
    """Return the configs that the function of a command takes."""
    module, _, function = COMMANDS[command][0].partition(":")
    body = inspect.unwrap(getattr(importlib.import_module(f"ara_cli.commands.{module}"), function))
    found = []
    for hint in get_type_hints(body, include_extras=True).values():
        kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        kind = get_args(kind)[0] if get_origin(kind) is Maker else kind
        if inspect.isclass(kind) and issubclass(kind, StageConfig):
            found.append((kind, *extras) if extras else (kind, None))
    return found


FIELDS = [
    (command, config, field, only.options[field] if only else None)
    for command in COMMANDS
    for config, only in configs(command)
    for field in (only.options if only else config.model_fields)
]


def test_every_config_of_a_stage_belongs_to_one_command() -> None:
    taken = [config for command in COMMANDS if command != "run" for config, _ in configs(command)]
    leaves, waiting = [], [StageConfig]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if not kind.__subclasses__() and kind.__module__.startswith(("ara.", "export.")):
            leaves.append(kind)
    assert sorted(taken, key=str) == sorted(set(leaves), key=str)


def test_the_fields_without_an_option() -> None:
    """They are found out: the machine that times layers, and the checksum of the file that ``--ranks`` names."""
    hidden = [(config, field) for _, config, field, _ in FIELDS if flag_of(config.model_fields[field].metadata).hidden]
    machine = "latency_machine"
    assert hidden == [(AllocateConfig, machine), (AllocateConfig, "ranks_sha256"), (CompareConfig, machine)]


@pytest.mark.parametrize(
    ("command", "config", "field", "name"), FIELDS, ids=[f"{one[0]}-{one[2]}-{one[1].__name__}" for one in FIELDS]
)
def test_a_field_is_one_option_with_its_words_and_default(
    command: str, config: type[StageConfig], field: str, name: str | None
) -> None:
    info = config.model_fields[field]
    option = OPTIONS[command].get(name or flag_of(info.metadata).name or field)
    if flag_of(info.metadata).hidden:
        assert option is None
        return
    # An option that several stages of `ara run` share has the words of the first.
    sharing = [one for one, only in configs(command) if only and name is None and only.options.get(field, "") is None]
    assert option.help == (sharing[0].model_fields[field] if sharing else info).description
    assert sum(one.help == option.help for one in OPTIONS[command].values()) == 1
    shown, default = option.default, info.get_default(call_default_factory=True)
    if shown is not None:
        assert shown == (",".join(map(str, default)) if isinstance(default, tuple) else default)
    # What is not typed is the default of the config, also where the help does not show it.
    assert option.required == info.is_required()
    if not info.is_required():
        value = FieldOption(config, field, name).value({option.name: shown, "remove": None})
        assert value in (None, default)


class ToyConfig(StageConfig):
    """A config with one field of every kind."""

    model: Annotated[str, Flag(argument=True, metavar="MODEL")] = Field(description="which model")
    seq_len: int = Field(8, ge=2, le=16, description="tokens")
    share: Annotated[float, Flag(removable=True)] = Field(0.75, gt=0, le=1, description="what stays")
    layout: Literal["a", "b"] = Field("a", description="how")
    chat: bool = Field(True, description="talk")
    dense: bool = Field(False, description="write dense weights")
    sizes: Annotated[tuple[int, ...], Flag(commas="size", may_be_empty=True)] = Field((1, 4), description="sizes")
    tasks: Annotated[tuple[str, ...], Flag(commas="task", example="x")] = Field((), description="tasks")
    patterns: tuple[str, ...] = Field((), description="patterns")
    options: Annotated[dict[str, str], Flag(name="option", short="-O")] = Field({}, description="pairs")
    checksum: Annotated[str | None, Flag(hidden=True)] = Field(None, description="not typed")


@dataclass(frozen=True)
class WhichThing:
    """A group of options."""

    origin: Annotated[str | None, typer.Option("--from", help="thing {use} [default: the latest]")] = None


def invoke(function: Any, *words: str) -> Any:
    single = typer.Typer(rich_markup_mode=None)
    single.command()(function)
    return CliRunner().invoke(single, list(words))


def toy() -> tuple[Any, list[Any]]:
    got: list[Any] = []

    @command_line(after={"model": ("origin",)}, without=("force",))
    def command(*, config: ToyConfig, which: Annotated[WhichThing, "to eat"], s: Session) -> None:
        got.extend((config, which, s))

    return command, got


def test_defaults_are_those_of_the_config() -> None:
    command, got = toy()
    assert invoke(command, "m").exit_code == 0
    assert got[:2] == [ToyConfig(model="m"), WhichThing()]


def test_every_kind_of_option_is_read() -> None:
    command, got = toy()
    words = [
        "m",
        "--from",
        "y",
        "--seq-len",
        "4",
        "--remove",
        "0.5",
        "--layout",
        "b",
        "--no-chat",
        "--dense",
        "-w",
        "here",
    ]
    lists = ["--sizes", "2,3,2", "--tasks", "p,q", "--patterns", "*.a", "--patterns", "*.b"]
    assert invoke(command, *words, *lists, "-O", "x=1", "--option", "y=2=3").exit_code == 0
    config, which, s = got
    assert config == ToyConfig(
        model="m",
        seq_len=4,
        share=0.5,
        layout="b",
        chat=False,
        dense=True,
        sizes=(2, 3),
        tasks=("p", "q"),
        patterns=("*.a", "*.b"),
        options={"x": "1", "y": "2=3"},
    )
    assert which.origin == "y"
    assert str(s.root) == "here" and s.force is False


def test_the_help_has_names_types_choices_and_the_order_asked_for() -> None:
    command, _ = toy()
    parameters = list(inspect.signature(command).parameters)
    expected = [
        "model",
        "origin",
        "seq_len",
        "share",
        "remove",
        "layout",
        "chat",
        "dense",
        "sizes",
        "tasks",
        "patterns",
    ]
    assert parameters == [*expected, "option", "workspace", "offload", "quiet", "as_json"]
    text = " ".join(invoke(command, "--help").output.split())
    assert "--layout a|b how [default: a]" in text
    assert "--chat / --no-chat" in text and "--no-dense" not in text
    assert "thing to eat [default: the latest]" in text
    assert "--sizes" in text and "[default: 1,4]" in text
    assert "--checksum" not in text and "--force" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seq-len", "1", "--layout", "c"], ["seq-len: input should be", "layout: input should be 'a' or 'b'"]),
        (["--sizes", "1,x"], ["--sizes '1,x': expected whole numbers"]),
        (["--tasks", ","], ["--tasks ',' names no task"]),
        (["-O", "x"], ["expected NAME=VALUE"]),
        (["--share", "0.5", "--remove", "0.5"], ["are both given"]),
        (["--from", ""], ["Invalid value for --from: it is empty"]),
        (["--patterns", ""], ["Invalid value for --patterns: it is empty"]),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_place(words: list[str], said: list[str]) -> None:
    command, got = toy()
    result = invoke(command, "m", *words)
    assert result.exit_code == 2 and not got
    for line in said:
        assert line in result.stderr


def test_an_empty_text_is_a_value_where_the_field_says_so() -> None:
    command, got = toy()
    assert invoke(command, "m", "--sizes", "").exit_code == 0
    assert got[0].sizes == ()


def test_a_maker_builds_with_further_fields_when_it_is_asked() -> None:
    made: list[Any] = []

    @command_line()
    def command(
        *,
        first: Annotated[Maker[DecomposeConfig], Only("model", "seed")],
        second: Annotated[Maker[EvalConfig], Only("seed", words="seq_len")],
        s: Session,
    ) -> None:
        made.extend((first(text="c4"), first(text=None)))
        if s.force:
            made.append(second())

    assert list(inspect.signature(command).parameters)[:3] == ["model", "seed", "words"]
    # The second config is wrong, which nobody notices as long as it is not built.
    assert invoke(command, "m", "--seed", "3", "--words", "1").exit_code == 0
    assert made == [DecomposeConfig(model="m", seed=3, text="c4"), DecomposeConfig(model="m", seed=3)]
    result = invoke(command, "m", "--words", "1", "--force")
    assert result.exit_code == 2 and "seq-len: input should be" in result.stderr


def test_groups_name_a_checkpoint_and_an_export() -> None:
    assert WhichCheckpoint().asked is None and WhichCheckpoint("mine").asked == "mine"
    assert WhichExport().asked("torch") is None and WhichExport("mine").asked("onnx") == "mine"
    for export, backend in (WhichExport("mine"), "torch"), (WhichExport("../x"), "onnx"):
        with pytest.raises(UsageError):
            export.asked(backend)
