"""Processes that cannot meet."""

from __future__ import annotations

import socket

import pytest

from ara.distributed.launch import Launch
from ara.distributed.torch_group import joined
from ara.errors import ProcessLostError


def test_a_port_in_use_is_named_with_the_option_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": 0}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ProcessLostError) as lost, joined(Launch(0, 2, 0, 2)):
            pass
    assert str(lost.value) == (
        f"process 0 of 2 cannot reach the others: port {port} of this machine is in use, perhaps by another run"
    )
    assert lost.value.hint == "give this run a port of its own: torchrun --master-port N"
