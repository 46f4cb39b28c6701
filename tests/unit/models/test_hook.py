"""``import ara`` is cheap, and fills transformers' tables whichever was imported first.

Here transformers is a stand-in of three small files, so that a process takes no time; that both orders load real
checkpoints with the real one is tested in ``test_checkpoint.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ara
from ara.layouts import modeling_ara
from ara.models import hook

_REPOSITORY = Path(__file__).resolve().parents[3]

_REPORT = """
import sys, json
from transformers.quantizers import auto
print(json.dumps({
    "config": sorted(auto.AUTO_QUANTIZATION_CONFIG_MAPPING),
    "quantizer": sorted(auto.AUTO_QUANTIZER_MAPPING),
    "finders": [type(finder).__name__ for finder in sys.meta_path if "ara" in type(finder).__module__],
    "loads": auto.LOADS,
}))
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """Return a folder with a package that has transformers' tables, with one quantizer of its own in them."""
    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "auto.py").write_text(
        "LOADS = globals().get('LOADS', 0) + 1\n"
        "AUTO_QUANTIZATION_CONFIG_MAPPING = {'other': object}\n"
        "AUTO_QUANTIZER_MAPPING = {'other': object}\n"
    )
    return tmp_path


def _python(script: str, *paths: Path) -> Any:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, _REPOSITORY]))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "imports",
    [
        "import ara, transformers",
        "import transformers, ara",
        "import transformers.quantizers.auto, ara",
        "import ara, importlib; importlib.reload(ara); import transformers.quantizers.auto; importlib.reload(ara)",
    ],
)
def test_every_order_of_imports_fills_the_tables_once(imports: str, stand_in: Path) -> None:
    found = _python(imports + _REPORT, stand_in)
    assert found["config"] == found["quantizer"] == ["ara", "other"]
    assert found["finders"] == []  # the one that waited has gone
    assert found["loads"] == 1


def test_import_ara_is_cheap_and_waits() -> None:
    heavy, waiting = _python(
        "import sys, json, importlib, ara\n"
        "importlib.reload(ara)\n"
        "heavy = sorted({'torch', 'transformers', 'numpy', 'pydantic', 'safetensors'} & set(sys.modules))\n"
        "waiting = [type(finder).__name__ for finder in sys.meta_path if 'ara' in type(finder).__module__]\n"
        "print(json.dumps([heavy, waiting]))\n"
    )
    assert heavy == []
    assert waiting == ["_Finder"]


def test_a_missing_transformers_stays_an_import_error(tmp_path: Path) -> None:
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").touch()
    (tmp_path / "transformers" / "quantizers.py").touch()  # a release without the table
    found = _python(
        "import json, ara\n"
        "try:\n    import transformers.quantizers.auto\n"
        "except ModuleNotFoundError as error:\n    print(json.dumps(error.name))\n",
        tmp_path,
    )
    assert found == "transformers.quantizers.auto"


def test_the_stand_ins_give_the_real_classes() -> None:
    config = hook._ConfigStandIn.from_dict({"quant_method": "ara", "ranks": {"a.b": 3}})
    assert type(config) is modeling_ara.AraConfig and config.ranks == {"a.b": 3}
    quantizer = hook._quantizer_stand_in(config, pre_quantized=True)
    assert type(quantizer) is modeling_ara.AraQuantizer and quantizer.quantization_config is config
    assert hook.QUANT_METHOD == modeling_ara.QUANT_METHOD


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ara' has no attribute 'lod'"):
        _ = ara.lod
