"""Commands that torchrun has started in several processes, and that run in one."""

from __future__ import annotations

import pytest

from ara_cli.app import COMMANDS
from tests.cli.test_odd_values import VALID
from tests.commands import ara, refused

SEVERAL = ("decompose", "train-masks", "allocate", "recover", "eval")
FIRST = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in SEVERAL])
def test_a_command_for_one_process_refuses_several(command, tmp_path):
    words = [word.replace("MODEL", "demo").replace("TEXT", "c4") for word in VALID[command]]
    place = [] if command in ("models", "methods") else ["-w", tmp_path / "ws"]
    result = ara(command, *words, *place, env=FIRST)
    refused(result, 2, "this command runs in one process, and there are 2", "without torchrun")
    assert not (tmp_path / "ws").exists()


def test_other_processes_than_the_first_say_nothing(tmp_path):
    result = ara("status", "-w", tmp_path, env={**FIRST, "RANK": "1", "LOCAL_RANK": "1"})
    assert result.exit_code == 2
    assert result.output == ""


def test_several_processes_without_torchrun_are_refused(tmp_path):
    result = ara("decompose", "demo", "-w", tmp_path / "ws", env={"WORLD_SIZE": "2", "RANK": "0"})
    refused(result, 2, "WORLD_SIZE is 2, and LOCAL_WORLD_SIZE is not set", "torchrun")


def test_one_process_of_torchrun_is_one_process(tmp_path):
    one = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert ara("models", env=one).exit_code == 0
