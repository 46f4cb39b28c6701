"""Single linear layers in ONNX Runtime, with the nodes that an export gives them, for ``--objective latency``."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from safetensors.torch import save_file

from ara.evaluation.layer_times import LayerRuntime, random_tensors
from ara.evaluation.speed import Prepared
from ara.layouts.modeling_ara import CHECKPOINT_FORMAT, AraConfig
from ara.models.folder import SINGLE
from ara.models.weights import LinearSpec
from export.onnx.export_report import Precision
from export.onnx.graph_options import GraphOptions
from export.onnx.linear_nodes import LinearNodes
from export.onnx.nodes import IR_VERSION
from export.onnx.runner import ERRORS_ONLY, PROVIDERS
from export.onnx.stored_weights import Checkpoint

_PATH = "layer"


class OnnxLayers:
    """Layers in ONNX Runtime on the CPU; see :class:`ara.evaluation.layer_times.LayerRunner`.

    Args:
        precision: of the weights, as of an export.
        threads: CPU threads.
    """

    def __init__(self, precision: Precision, threads: int) -> None:
        self._precision: Precision = precision
        self.runtime = LayerRuntime("onnx", "cpu", precision, threads, f"onnxruntime {ort.__version__}")

    def prepare(self, spec: LinearSpec, rank: int | None, tokens: int) -> Prepared:
        """Write the layer as a checkpoint, and load its graph."""
        session = layer_session(spec, rank, self._precision, self.runtime.threads)
        binding = session.io_binding()
        binding.bind_cpu_input("x", np.random.default_rng(0).standard_normal((1, tokens, spec.n), np.float32))
        binding.bind_output("y")
        return Prepared(lambda: session.run_with_iobinding(binding))


def layer_session(spec: LinearSpec, rank: int | None, precision: Precision, threads: int) -> ort.InferenceSession:
    """Return the graph of a layer with random weights: x (1, t, n) → y (1, t, m), float32.

    Args:
        spec: shape (m, n) and layout.
        rank: k; ``None`` for the dense layer.
        precision: of the weights.
        threads: CPU threads.
    """
    with TemporaryDirectory() as folder:
        # Weights are read from the checkpoint while the graph is saved.
        return load_graph(_graph(_stored(Path(folder), spec, rank), spec, precision), threads)


def load_graph(graph: ir.Graph, threads: int) -> ort.InferenceSession:
    """Load a graph into ONNX Runtime on the CPU.

    Args:
        graph: with its weights.
        threads: CPU threads.
    """
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(ir.Model(graph, ir_version=IR_VERSION), path, external_data="model.onnx.data")
        return ort.InferenceSession(str(path), options, providers=[PROVIDERS["cpu"]])


def _stored(folder: Path, spec: LinearSpec, rank: int | None) -> Checkpoint:
    """Write a checkpoint of one layer with random weights."""
    save_file(
        {f"{_PATH}.{name}": tensor for name, tensor in random_tensors(spec, rank).items()},
        folder / SINGLE,
    )
    ranks = {} if rank is None else {_PATH: rank}
    about = AraConfig(ranks, CHECKPOINT_FORMAT, layout=spec.layout).to_dict()
    (folder / "config.json").write_text(json.dumps({"quantization_config": about}), encoding="utf-8")
    return Checkpoint(folder)


def _graph(checkpoint: Checkpoint, spec: LinearSpec, precision: Precision) -> ir.Graph:
    """Return the graph of a checkpoint's only layer."""
    nodes = LinearNodes(checkpoint, GraphOptions(precision))
    x = nodes.input("x", ir.DataType.FLOAT, [1, "t", spec.n])
    y = nodes.linear(x, nodes.checkpoint.linear(_PATH, spec.m, spec.n))
    y.name, y.type, y.shape = "y", x.type, ir.Shape([1, "t", spec.m])
    nodes.graph.outputs.append(y)
    return nodes.graph
