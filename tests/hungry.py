"""Stand-ins for models that take a known amount of memory, for processes that must be able to import them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from ara.errors import ModelError


@dataclass(frozen=True)
class Hungry:
    """Takes so many bytes when it is prepared, and no more when it runs."""

    size: int

    def prepare(self, case: Any) -> Hungry:
        print("a library that prints")
        object.__setattr__(self, "_held", bytearray(b"x") * self.size)
        return self

    def run(self) -> None:
        pass


def refuse() -> Hungry:
    raise ModelError("the weights are torn", "mend them")


def die() -> Hungry:
    os._exit(9)


def linger(told: str) -> Hungry:
    """Write the process's number into a file, and take long."""
    with open(told, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(600)
    return Hungry(0)
