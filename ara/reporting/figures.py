"""SVG pictures for files, drawn by matplotlib without a display."""

from __future__ import annotations

import io
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ara.models.weights import LinearSpec
from ara.printable import printable
from ara.solver.problem import Allocation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
# Text stays text, and the same figure gives the same bytes.
_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "ara"}


def keep_curves(curves: Mapping[str, Mapping[float, float]], dense: float, title: str) -> bytes:
    """Return an SVG of perplexity against the fraction of parameters kept; see :func:`perplexity_curves`."""
    return perplexity_curves(curves, dense, title, "keep: fraction of the factorised layers' parameters")


def size_curves(
    curves: Mapping[str, Mapping[float, float]], dense: float, title: str, dashed: Collection[str] = ()
) -> bytes:
    """Return an SVG of perplexity against megabytes; see :func:`perplexity_curves`."""
    return perplexity_curves(curves, dense, title, "size of the weight files, MB", dashed)


def perplexity_curves(
    curves: Mapping[str, Mapping[float, float]],
    dense: float,
    title: str,
    axis_title: str,
    dashed: Collection[str] = (),
) -> bytes:
    """Return an SVG of perplexity (logarithmic) against a measure of size.

    Args:
        curves: label → size → perplexity, drawn in order.
        dense: perplexity of the dense model, drawn as a line.
        title: above the picture.
        axis_title: what the sizes are.
        dashed: labels of curves to draw dashed, in the colour of the curve before.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axis = figure.subplots()
        markers, number = "os^Dv*PX", -1
        for label, points in curves.items():
            number += label not in dashed
            sizes = sorted(points)
            style: Any = {"color": f"C{number % 10}", "marker": markers[number % len(markers)], "markersize": 4}
            if label in dashed:
                style |= {"linestyle": "--", "fillstyle": "none"}
            axis.plot(sizes, [points[size] for size in sizes], label=label, **style)
        axis.axhline(dense, color="gray", linestyle="--", linewidth=1, label="dense")
        axis.set_yscale("log")
        axis.set_xlabel(axis_title)
        axis.set_ylabel("perplexity")
        axis.set_title(title, fontsize=10)
        axis.grid(True, which="both", linewidth=0.3)
        axis.legend(fontsize=8)
        return draw(figure)


def rank_heat_maps(allocations: Mapping[str, Allocation], specs: Sequence[LinearSpec], title: str) -> bytes:
    """Return an SVG with one heat map per allocation: one row per block, one column per kind of layer.

    The colour is the kept share of a layer's parameters; a dot marks a dense layer.

    Args:
        allocations: by name, at least one; costs in parameters.
        specs: the factorised layers.
        title: above the picture.
    """
    import matplotlib
    import numpy
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(spec.kind for spec in specs))
    layers = sorted({spec.layer for spec in specs})
    columns = min(len(allocations), 4)
    rows = -(-len(allocations) // columns)
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(2.6 * columns + 0.8, (0.13 * len(layers) + 1.4) * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        image = None
        for axis, (name, allocation) in zip(axes, allocations.items(), strict=False):
            shares = numpy.full((len(layers), len(kinds)), numpy.nan)
            for (layer, kind), together in by_place((spec.layer, spec.kind, spec) for spec in specs).items():
                row, column = layers.index(layer), kinds.index(kind)
                shares[row, column] = allocation.keep(together)
                if all(allocation.choices[spec.name].rank is None for spec in together):
                    axis.plot(column, row, ".", color="black", markersize=3)
            image = axis.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
            axis.set_title(name, fontsize=9)
            axis.set_xticks(range(len(kinds)), [short_kind(kind) for kind in kinds], rotation=60, fontsize=7)
            axis.tick_params(axis="y", labelsize=7)
        for axis in axes[len(allocations) :]:
            axis.set_axis_off()
        axes[0].set_ylabel("layer", fontsize=8)
        assert image is not None
        bar = figure.colorbar(image, ax=list(axes), fraction=0.02)
        bar.set_label("share of parameters kept (dot: dense)", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        figure.suptitle(title, fontsize=10)
        return draw(figure)


def by_place(layers: Iterable[tuple[int, str, T]]) -> dict[tuple[int, str], list[T]]:
    """Return (block, kind) → layers at this place of a map: one, or those of all experts."""
    found: dict[tuple[int, str], list[T]] = {}
    for block, kind, layer in layers:
        found.setdefault((block, kind), []).append(layer)
    return found


def short_kind(kind: str) -> str:
    """Return the last word of a kind of layer: ``up`` for ``mlp.up_proj``."""
    return kind.rpartition(".")[2].removesuffix("_proj")


def draw(figure: Figure) -> bytes:
    """Return a figure as SVG; with a fixed ``svg.hashsalt``, the same figure gives the same bytes."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # Text stays text in the SVG, so matplotlib's own font may lack glyphs.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure.savefig(picture, format="svg", metadata={"Date": None})
    # A name may contain characters that XML does not allow.
    return printable(picture.getvalue().decode()).encode()
