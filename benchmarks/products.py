"""Single products of ONNX Runtime on this machine: a float MatMul against MatMulNBits, form by form, in one run.

    make bench-products             # or: python benchmarks/products.py --shapes 576x576 --rows 1,128

Every graph has one product of an input (1, t, n) with a weight (m, n), or two for a rank: ``1536x128x576`` is
576 → 128 → 1536. All graphs of a shape run in turn, in one thread. The figures are medians of processor time, which
other work on the machine changes little. Forms of a weight:

- ``float``: float32, one MatMul.
- ``8/32``: MatMulNBits with 8 bits, blocks of 32 and zero points; ``a0``, ``a1`` and ``a4`` are its
  ``accuracy_level``: the activations stay, stay float32, or are rounded to 8 bits in blocks.

``8/32a4+float`` gives the two products of a rank different forms: first the one on the inputs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from ara_cli.console import Console
from benchmarks.in_turn import seconds_in_turn
from export.onnx.layer_runner import load_graph
from export.onnx.nodes import CONTRIB, GraphNodes

SHAPES = "576x576,1536x576,576x1536,49152x576"
LEVELS = (0, 1, 4)
# Passes that one measurement repeats, so that it takes at least this many seconds.
_LEAST = 0.004


class Form(NamedTuple):
    """How a weight is held: ``bits`` None for float32."""

    bits: int | None
    block: int = 0
    level: int = 0


def form(text: str) -> Form:
    """Read ``float`` or ``BITS/BLOCKaLEVEL``."""
    if text == "float":
        return Form(None)
    found = re.fullmatch(r"(\d+)/(\d+)a(\d+)", text)
    if found is None:
        raise SystemExit(f"{text!r} is no form: expected float or BITS/BLOCKaLEVEL, such as 8/32a4")
    return Form(*map(int, found.groups()))


def multiply(graph: GraphNodes, x: ir.Value, m: int, n: int, how: Form, path: str) -> ir.Value:
    """Return the product of x (…, n) with a random weight (m, n)."""
    numbers = np.random.default_rng(0)
    if how.bits is None:
        weight = graph.constant(f"{path}.weight", numbers.standard_normal((n, m), np.float32))
        return graph.op("MatMul", [x, weight], path)
    blocks = -(-n // how.block)
    steps = numbers.integers(256, size=(m, blocks, how.block * how.bits // 8), dtype=np.uint8)
    scales = numbers.random(m * blocks, np.float32)
    zeros = numbers.integers(256, size=m * -(-blocks * how.bits // 8), dtype=np.uint8)
    inputs = [
        graph.constant(f"{path}.{part}", array)
        for part, array in (("steps", steps), ("scales", scales), ("zeros", zeros))
    ]
    attributes = {"K": n, "N": m, "bits": how.bits, "block_size": how.block, "accuracy_level": how.level}
    return graph.op("MatMulNBits", [x, *inputs], path, attributes, domain=CONTRIB)


def session(widths: Sequence[int], forms: Sequence[Form]) -> ort.InferenceSession:
    """Return a graph of the products widths[-1] → … → widths[0]."""
    graph = GraphNodes()
    n = widths[-1]
    y = x = graph.input("x", ir.DataType.FLOAT, [1, "t", n])
    for i, (m, k) in enumerate(zip(widths[-2::-1], widths[:0:-1], strict=True)):
        y = multiply(graph, y, m, k, forms[i], f"product{i}")
    y.name, y.type, y.shape = "y", x.type, ir.Shape([1, "t", widths[0]])
    graph.graph.outputs.append(y)
    return load_graph(graph.graph, threads=1)


def repeated(model: ort.InferenceSession, rows: int, width: int) -> tuple[Callable[[], None], int]:
    """Return a function that runs a graph several times on t = ``rows`` rows, and how often."""
    feed = {"x": np.random.default_rng(1).standard_normal((1, rows, width), np.float32)}

    def once() -> None:
        model.run(None, feed)

    once()
    once()
    begun = time.process_time()
    once()
    times = max(1, round(_LEAST / (time.process_time() - begun)))

    def several() -> None:
        for _ in range(times):
            once()

    return several, times


def forms_of(widths: Sequence[int], chosen: Sequence[str]) -> dict[str, list[Form]]:
    """Return name → form of every product of a shape."""
    count = len(widths) - 1
    found = {}
    for name in chosen:
        parts = [form(part) for part in name.split("+")]
        if len(parts) in (1, count):
            found[name] = parts if len(parts) == count else parts * count
    return found


def main() -> None:
    """Print a table per shape, or JSON."""
    every = [f"{bits}/{block}a{level}" for bits in (8, 4) for block in (16, 32, 64, 128) for level in LEVELS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help=f"OUTxIN or OUTxRANKxIN [default: {SHAPES}]")
    parser.add_argument("--forms", default=",".join(["float", *every]), help="of the weights [default: all]")
    parser.add_argument("--rows", default="1,128", help="tokens per pass [default: 1,128]")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    console, chosen, results = Console(), arguments.forms.split(","), []
    for shape in arguments.shapes.split(","):
        widths = [int(width) for width in shape.split("x")]
        forms = forms_of(widths, chosen)
        models = {name: session(widths, how) for name, how in forms.items()}
        for rows in map(int, arguments.rows.split(",")):
            passes = {name: repeated(model, rows, widths[-1]) for name, model in models.items()}
            steps = {name: step for name, (step, _) in passes.items()}
            seconds = seconds_in_turn(console, steps, arguments.rounds, torch.device("cpu"), time.process_time)
            for name, (_, times) in passes.items():
                micro = 1e6 * statistics.median(seconds[name]) / times
                results.append({"shape": shape, "rows": rows, "form": name, "microseconds": micro})
                if not arguments.json:
                    print(f"{shape:>14} rows {rows:>4} {name:>16} {micro:>10.1f} µs")
    if arguments.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
