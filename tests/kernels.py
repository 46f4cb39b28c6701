"""Whether ONNX Runtime's CUDA provider has a kernel for every node of a graph, by the table ``cuda_kernels.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

_TABLE = Path(__file__).with_name("cuda_kernels.toml")


class NoKernel(Exception):
    """The CUDA provider has no kernel for a node."""


@dataclass(frozen=True)
class Operator:
    """One operator of the table.

    Attributes:
        inputs, outputs: ``name: type parameter`` each, or ``name: type``.
        versions: ``13+``, ``11-12`` or ``10`` → type parameter → its types.
        attributes: name → values that the kernels accept.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    versions: Mapping[str, Mapping[str, str]]
    attributes: Mapping[str, Sequence[Any]]


def require_kernels(model: ir.Model) -> None:
    """Check every node of a graph.

    Types are those of the graph's inputs and weights, carried through the nodes by the operators' type parameters.

    Raises:
        NoKernel: for the first node that has none.
    """
    types = {value: value.dtype for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for node in model.graph:
        operator = _table().get((node.domain, node.op_type))
        if operator is None:
            raise NoKernel(f"{node.name}: {node.op_type} is not in {_TABLE.name}")
        kernel = _kernel(node, operator, model.opset_imports)
        bound = _bind(node, operator, kernel, types)
        for value, (_, parameter) in zip(node.outputs, _formal(operator.outputs, node.outputs), strict=True):
            types[value] = _result(node, parameter, kernel, bound)
        for name, allowed in operator.attributes.items():
            _require(node, name, node.attributes[name].value, allowed)


def _kernel(node: ir.Node, operator: Operator, opsets: Mapping[str, int]) -> Mapping[str, str]:
    """Return the types of the kernel that ONNX Runtime takes for a node.

    It takes a kernel without a last version for the first one only: a later version may be another operator
    (``VerifyVersion`` in its core/framework/kernel_registry.cc).
    """
    version = 1  # of ONNX Runtime's own operators
    if onnx.defs.has(node.op_type, node.domain):
        version = onnx.defs.get_schema(node.op_type, opsets[node.domain], node.domain).since_version
    for span, types in operator.versions.items():
        first, _, last = span.removesuffix("+").partition("-")
        if int(first) <= version <= int(last or first):
            return types
    raise NoKernel(f"{node.name}: version {version} of {node.op_type}, expected {' or '.join(operator.versions)}")


def _bind(
    node: ir.Node, operator: Operator, kernel: Mapping[str, str], types: Mapping[ir.Value, ir.DataType | None]
) -> dict[str, ir.DataType | None]:
    """Return type parameter → its type, from the inputs of a node."""
    bound: dict[str, ir.DataType | None] = {}
    for value, (name, parameter) in zip(node.inputs, _formal(operator.inputs, node.inputs), strict=True):
        if value is None:
            continue
        if (allowed := _allowed(parameter, kernel)) is not None:
            _require(node, name, types[value], allowed)
        _require(node, name, types[value], [bound.setdefault(parameter, types[value])])
    return bound


def _result(
    node: ir.Node, parameter: str, kernel: Mapping[str, str], bound: Mapping[str, ir.DataType | None]
) -> ir.DataType | None:
    """Return the type of an output; ``None`` where neither the inputs nor the kernel determine it."""
    if node.op_type == "Cast":
        to = ir.DataType(node.attributes["to"].as_int())
        _require(node, "to", to, _allowed(parameter, kernel) or ())
        return to
    if parameter in bound:
        return bound[parameter]
    allowed = _allowed(parameter, kernel) or ()
    return allowed[0] if len(allowed) == 1 else None


def _allowed(parameter: str, kernel: Mapping[str, str]) -> Sequence[ir.DataType] | None:
    """Return the allowed types of a parameter such as T1; a type such as int64 is its own; ``None``: any type."""
    if parameter not in kernel and parameter[0].isupper():
        return None
    return [ir.DataType[name.upper()] for name in kernel.get(parameter, parameter).split()]


def _require(node: ir.Node, what: str, found: Any, allowed: Sequence[Any]) -> None:
    if found not in allowed:
        raise NoKernel(f"{node.name}: {what} is {found}, expected {' or '.join(map(str, allowed))}")


def _formal(parameters: Sequence[str], actual: Sequence[Any]) -> list[tuple[str, str]]:
    """Return name and type parameter of every actual input or output."""
    pairs = [(name, parameter) for name, _, parameter in (text.partition(": ") for text in parameters)]
    if pairs[-1][0].endswith("..."):
        pairs += pairs[-1:] * len(actual)
    return pairs[: len(actual)]


@cache
def _table() -> dict[tuple[str, str], Operator]:
    """Return (domain, name) → operator; ONNX's own domain is an empty text, as in graphs."""
    domains = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    return {
        (domain.replace("ai.onnx", ""), name): Operator(**{"attributes": {}, **entry})
        for domain, operators in domains.items()
        for name, entry in operators.items()
    }
