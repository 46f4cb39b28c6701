"""The pictures: well-formed SVG with its words as text, and the same bytes for the same figures."""

from xml.etree import ElementTree

import pytest

from ara.models.weights import LinearSpec
from ara.reporting.figures import keep_curves, rank_heat_maps
from ara.solver.problem import Allocation

SPECS = [LinearSpec(f"layers.{i}.{kind}", i, kind, 20, 10) for i in range(3) for kind in ("attn.q_proj", "mlp.up_proj")]


def _words(picture):
    return {node.text for node in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")}


@pytest.mark.parametrize("count", [1, 4, 5])
def test_heat_maps(count):
    allocations = {
        f"method {n}": Allocation.of_ranks(
            SPECS, {spec.name: None if i == n else 1 + i for i, spec in enumerate(SPECS)}
        )
        for n in range(count)
    }
    picture = rank_heat_maps(allocations, SPECS, "Share kept")
    words = _words(picture)
    assert {"Share kept", "q", "up", "layer", *allocations} <= words
    assert picture == rank_heat_maps(allocations, SPECS, "Share kept")
    even = Allocation.of_ranks(SPECS, dict.fromkeys((spec.name for spec in SPECS), 2))
    assert picture != rank_heat_maps({**allocations, "method 0": even}, SPECS, "Share kept")


@pytest.mark.filterwarnings("error")
def test_names_cannot_break_a_picture():
    """Letters that the font has not, and characters that XML has not."""
    picture = keep_curves({"日本 \x1b[1m\u202e": {0.6: 100.0, 0.8: 30.0}}, 10.0, "\x00")
    assert {"日本 \ufffd[1m\ufffd", "\ufffd"} <= _words(picture)


def test_keep_curves():
    curves = {"uniform": {0.6: 100.0, 0.8: 30.0}, "ARA": {0.6: 40.0, 0.8: 15.0}}
    picture = keep_curves(curves, 10.0, "WikiText-2")
    assert {"uniform", "ARA", "dense", "WikiText-2", "perplexity"} <= _words(picture)
    assert picture == keep_curves(curves, 10.0, "WikiText-2")
