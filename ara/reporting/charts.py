"""The pictures of the report: inline SVG in the colours of the page, light or dark.

Lines and words are drawn in placeholder colours, which are replaced by ``currentColor`` and CSS variables of the page.
Series also differ in markers and dashes, so that they can be told apart without colours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from ara.artifacts.evaluation import DENSE, UNIFORM
from ara.reporting.checkpoint_parts import Layer
from ara.reporting.comparison_parts import SizeFront
from ara.reporting.figures import by_place, draw, short_kind
from ara.reporting.pareto_parts import Front, SpeedFront
from ara.reporting.training_parts import Trained

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholders: colours that are in no colour map.
_INK, _GRID = "#010203", "#010204"
_SERIES = tuple(f"#0102{10 + number}" for number in range(6))
_REPLACED = {_INK: "currentColor", _GRID: "var(--grid)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, 1)
}
_MARKERS, _DASHES = "osD^vX", ("-", "--", "-.", ":", "-", "--")
_FORM_MARKERS = "osD^vXP*"
_UNIFORM_STYLE = 5
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Inches and points: on a phone, where a picture is as wide as the screen, a point is about a pixel.
_WIDTH, _FONT = 4.6, 8.5
# Inches of the map of a model with very many decoder blocks.
_TALLEST = 5.5
# Ratio of the largest to the smallest perplexity from which the axis is logarithmic, and from which it has fewer ticks.
_WIDE, _FAR = 2.0, 20.0
# Components below this share of the first are not drawn.
_FLOOR = 1e-5
# Margin left and right of the points, as a share of the parameters.
_MARGIN = 0.04
# The range of the colour map that is visible on white and on black.
_DEPTHS = (0.25, 0.8)


def rank_map(layers: Sequence[Layer]) -> str:
    """Return a map of the share of parameters that every layer keeps: one row per block, one column per kind.

    The layers of all experts of a block share one place, which shows their mean; its dot says that all are dense.
    """
    import numpy

    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    blocks = sorted({layer.layer for layer in layers})
    shares = numpy.full((len(blocks), len(kinds)), numpy.nan)
    dense = []
    for (block, kind), together in by_place((layer.layer, layer.kind, layer) for layer in layers).items():
        place = blocks.index(block), kinds.index(kind)
        shares[place] = sum(layer.keep for layer in together) / len(together)
        if all(layer.rank is None for layer in together):
            dense.append(place)
    with _figure(1.5 + min(0.13 * max(len(blocks), 8), _TALLEST)) as figure:
        axis = figure.subplots()
        image = axis.pcolormesh(shares, vmin=0, vmax=1, cmap="viridis", edgecolors="face", linewidth=0.2)
        axis.plot([x + 0.5 for _, x in dense], [y + 0.5 for y, _ in dense], ".", color="black", markersize=3)
        axis.set_xticks([x + 0.5 for x in range(len(kinds))], [short_kind(kind) for kind in kinds], rotation=45)
        step = -(-len(blocks) // 16)
        axis.set_yticks([y + 0.5 for y in range(0, len(blocks), step)], [str(block) for block in blocks[::step]])
        axis.invert_yaxis()
        axis.set_ylabel("decoder block")
        axis.tick_params(length=0)
        bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.02)
        bar.set_label("share kept (dot: dense)")
        bar.outline.set_visible(False)
        return _inline(figure, "ranks", "Share of parameters that every layer keeps")


def spectra(layers: Sequence[Layer]) -> str:
    """Return the spectra by kind of layer, with a dot at each cut; of a block's experts that of the first."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullLocator

    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    last = max(layer.layer for layer in layers) or 1
    rows = -(-len(kinds) // 2)
    with _figure(1.25 * rows + 0.5) as figure:
        axes = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True).flatten()
        for axis, kind in zip(axes, kinds, strict=False):
            first_of_block = {layer.layer: layer for layer in reversed(layers) if layer.kind == kind}
            for layer in reversed(first_of_block.values()):
                full, first = layer.components[-1], layer.spectrum[0] or 1.0
                shares = [value / first or None for value in layer.spectrum]
                depth = _DEPTHS[0] + (_DEPTHS[1] - _DEPTHS[0]) * layer.layer / last
                colour = colormaps["viridis"](depth)
                places = [component / full for component in layer.components]
                axis.plot(places, [_gap(share) for share in shares], color=colour, linewidth=0.6)
                if layer.rank is not None:
                    height = shares[layer.components.index(layer.rank)]
                    axis.plot(layer.rank / full, _gap(height), "o", color=colour, markersize=2.6)
            axis.set_yscale("log")
            axis.set_ylim(_FLOOR, 2.0)
            axis.yaxis.set_major_locator(LogLocator(numticks=4))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(_power)
            axis.set_title(short_kind(kind), fontsize=_FONT)
            axis.grid(True, linewidth=0.4)
        for axis in axes[len(kinds) :]:
            axis.set_axis_off()
        figure.supxlabel("component, as a share of the full rank (dot: the cut; dark: first blocks)", fontsize=_FONT)
        figure.supylabel("relative to the first component", fontsize=_FONT)
        return _inline(figure, "spectra", "Spectra of all layers and where they are cut")


def training_curves(training: Trained) -> str:
    """Return the objective and the held-out loss against steps, one line per budget."""
    with _figure(2.6) as figure:
        left, right = figure.subplots(1, 2)
        for number, curve in enumerate(training.curves):
            style = _style(number)
            for axis, key in ((left, "loss"), (right, "held_out")):
                points = [(step.step, getattr(step, key)) for step in curve.log if getattr(step, key) is not None]
                label = f"keep {curve.keep:g}" if axis is left else None
                axis.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
            right.plot(curve.best_step, curve.held_out, "o", markersize=8, fillstyle="none", color=style["color"])
        left.set_title(f"training loss ({training.loss}, nats/token)", fontsize=_FONT)
        right.set_title("held-out loss (ring: kept)", fontsize=_FONT)
        for axis in (left, right):
            axis.set_xlabel("step")
            axis.grid(True, linewidth=0.4)
        _legend(figure)
        return _inline(figure, "training", "Training and held-out loss")


def keep_front(front: Front, name: str) -> str:
    """Return perplexity against the share kept, one line per method; ``name`` is unique on the page."""
    with _figure(2.9) as figure:
        axis = figure.subplots()
        for series, style in _styles(point.series for point in front.points).items():
            points = sorted((p for p in front.points if p.series == series), key=lambda point: point.linear_keep)
            keeps = [point.linear_keep for point in points]
            axis.plot(keeps, [point.perplexity for point in points], label=series, **style)
        for point in front.points:
            if point.current:
                _ring(axis, point.linear_keep, point.perplexity)
        axis.axhline(front.dense, color=_INK, linestyle=(0, (1, 2)), linewidth=1, label=DENSE)
        _perplexity_axis(axis, [front.dense, *(point.perplexity for point in front.points)])
        shares = [point.linear_keep for point in front.points]
        axis.set_xlim(min(shares) - _MARGIN, max(shares) + _MARGIN)
        axis.set_xlabel("share of the factorised layers' parameters kept")
        axis.xaxis.set_major_formatter(_percent)
        axis.grid(True, linewidth=0.4)
        _legend(figure)
        return _inline(figure, name, f"Perplexity on {front.task} against the share of parameters kept")


def size_front(front: SizeFront, name: str) -> str:
    """Return perplexity on held-out text against megabytes, one line per form; ``name`` is unique on the page."""
    measured = [(p.title, p.bytes / 1e6, p.perplexity) for p in front.points if p.bytes and p.perplexity is not None]
    repaired = {point.title for point in front.points if point.recovered is not None}
    with _figure(4.2 if repaired else 3.2) as figure:
        axis, number = figure.subplots(), -1
        for title in dict.fromkeys(title for title, _, _ in measured):
            # A repaired form follows the same form without repairs, and has its style with hollow markers.
            number += title not in repaired
            points = sorted((size, perplexity) for other, size, perplexity in measured if other == title)
            # More forms than colours: the marker tells them apart.
            style = {**_style(number), "marker": _FORM_MARKERS[number % len(_FORM_MARKERS)]}
            if title in repaired:
                style["fillstyle"] = "none"
            axis.plot([size for size, _ in points], [value for _, value in points], label=title, **style)
        _perplexity_axis(axis, [perplexity for _, _, perplexity in measured])
        axis.set_xlabel("size of the weight files, MB")
        axis.grid(True, linewidth=0.4)
        _legend(figure)
        return _inline(figure, name, "Perplexity on held-out calibration text against the size of the weight files")


def speed_front(front: SpeedFront) -> str:
    """Return quality against speed, one marker per method."""
    with _figure(2.9) as figure:
        axis = figure.subplots()
        for series, style in _styles(point.series for point in front.points).items():
            points = [point for point in front.points if point.series == series]
            axis.errorbar(
                [point.ratio.median for point in points],
                [point.quality for point in points],
                xerr=[
                    [point.ratio.median - min(point.ratio.low, point.ratio.median) for point in points],
                    [max(point.ratio.high, point.ratio.median) - point.ratio.median for point in points],
                ],
                yerr=[point.stderr or 0.0 for point in points],
                elinewidth=0.8,
                label=series,
                **{**style, "linestyle": "none"},
            )
        for point in front.points:
            if point.current:
                _ring(axis, point.ratio.median, point.quality)
        if front.measure == "accuracy":
            axis.yaxis.set_major_formatter(_percent)
            axis.set_ylabel("accuracy")
        else:
            _perplexity_axis(axis, [point.quality for point in front.points])
        axis.set_xlabel(f"speed relative to dense:\n{front.speed}")
        axis.grid(True, linewidth=0.4)
        _legend(figure)
        return _inline(figure, "speed", f"{front.measure} ({front.task}) against speed")


@contextmanager
def _figure(height: float) -> Iterator[Figure]:
    """Yield a figure in placeholder colours."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ara",
        "text.parse_math": False,  # a name may contain dollar signs
        "font.size": _FONT,
        "grid.color": _GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        **dict.fromkeys(ink, _INK),
    }
    with matplotlib.rc_context(settings):
        yield Figure(figsize=(_WIDTH, height), layout="constrained")


def _inline(figure: Figure, name: str, label: str) -> str:
    """Return the figure as an element of a page: with unique ids, without its own style and size."""
    text = draw(figure).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    # Ids are unique within a picture; the prefix makes them unique within the page.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", text)
    # Only within tags: numbers in words stay as they are.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"-?\d+\.\d{3,}", _rounded, tag[0]), text)
    for colour, replacement in _REPLACED.items():
        text = text.replace(colour, replacement)
    attributes = re.search(r'viewBox="[^"]+"', text)
    assert attributes is not None
    head = f'<svg {attributes[0]} role="img" aria-label="{escape(label)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, text, count=1).strip()


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _styles(series: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the style of every series, the same in all pictures, with fixed ones for dense and uniform."""
    names = sorted(dict.fromkeys(series), key=lambda name: (name == DENSE, name.startswith(UNIFORM)))
    methods = [name for name in names if name != DENSE and not name.startswith(UNIFORM)]
    styles = {}
    for name in names:
        if name in methods:
            styles[name] = _style(methods.index(name) % _UNIFORM_STYLE)
        else:
            styles[name] = {**_style(_UNIFORM_STYLE), **({"color": _INK, "marker": "P"} if name == DENSE else {})}
    return styles


def _style(number: int) -> dict[str, Any]:
    place = number % len(_SERIES)
    return {
        "color": _SERIES[place],
        "marker": _MARKERS[place],
        "markersize": 4,
        "linestyle": _DASHES[place],
        "linewidth": 1.3,
    }


def _ring(axis: Axes, x: float, y: float) -> None:
    axis.plot(x, y, "o", markersize=10, fillstyle="none", color=_INK, markeredgewidth=1, label="this checkpoint")


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=_FONT)


def _perplexity_axis(axis: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axis.set_ylabel("perplexity")
    if max(values) > _WIDE * min(values):
        axis.set_yscale("log")
        far = max(values) > _FAR * min(values)
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if far else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _power(value: float, _: float) -> str:
    """Return a power of ten with superscript digits: matplotlib does not parse mathematics here."""
    return "10" + str(round(math.log10(value))).translate(_SUPERSCRIPTS)


def _percent(value: float, _: float) -> str:
    return f"{value:.1%}".replace(".0%", "%")


def _gap(value: float | None) -> float:
    """Return a value, or NaN for none: a logarithmic axis has no zero."""
    return math.nan if value is None else value
