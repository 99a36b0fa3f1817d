"""Small plots as inline SVG. Colours are the page's CSS variables, so that one plot works in light and in dark.

Every function takes a `name`, unique on the page, and returns one panel. The same input gives the same text.
"""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from steelyard.report.blocks import Style

Floats = NDArray[np.float64]
Values = Floats | Sequence[float | None]

# matplotlib wants colours, the page wants variables: each stands for one variable and is replaced in the text.
_PALETTE = [f"#0000{0xA0 + i:02x}" for i in range(10)]
_INK, _MUTED, _GRID, _PAPER, _BAD = "#0000b0", "#0000b1", "#0000b2", "#0000b3", "#0000b4"
_VARIABLES = {
    **{colour: f"var(--c{i})" for i, colour in enumerate(_PALETTE)},
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
    _PAPER: "var(--card)",
    _BAD: "var(--bad)",
}
# Rastered points cannot change with the theme: middle tones that read on white and on black.
_RASTER_PLAIN, _RASTER_BAD = "#5b8fc7", "#d9622b"

_LIMIT = 160
_SIZE = (4.4, 2.75)
_SMALL = (3.15, 2.2)  # where three or more stand side by side, so that letters stay equally large
_STEPS = [1, 2, 2.5, 5, 10]
_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "steelyard",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.2,
    "savefig.transparent": True,
    "path.simplify_threshold": 0.3,
}


@dataclass(frozen=True)
class Series:
    """Points (x, y) in one style; `low` and `high` bound a band (lines) or an interval (dots)."""

    x: Values
    y: Values
    style: Style
    low: Values | None = None
    high: Values | None = None


def thin(x: Values, *ys: Values, limit: int = _LIMIT) -> tuple[Floats, ...]:
    """x and every y at no more than `limit` points: means of equal runs of neighbours.

    Points at which any of them is not finite are left out.
    """
    columns = np.stack([_array(v) for v in (x, *ys)])
    columns = columns[:, np.isfinite(columns).all(0)]
    n = columns.shape[1]
    if n > limit:
        edges = np.linspace(0, n, limit + 1).astype(int)[:-1]
        columns = np.add.reduceat(columns, edges, axis=1) / np.diff(np.append(edges, n))
    return tuple(columns)


def lines(
    name: str,
    series: Sequence[Series],
    xlabel: str,
    ylabel: str,
    *,
    marks: bool = False,
    level: float | None = None,
    diagonal: bool = False,
    xlim: tuple[float, float] | None = None,
    ylim: tuple[float, float] | None = None,
    xticks: Sequence[float] | None = None,
    small: bool = False,
) -> Markup:
    """Lines over x, with a mark at the last point or (`marks`) at all; a dashed level or diagonal to compare with."""
    with matplotlib.rc_context(_RC):
        figure, axes = _axes(xlabel, ylabel, small)
        if level is not None:
            axes.axhline(level, color=_MUTED, linewidth=1, dashes=(3, 2))
        if diagonal:
            axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, dashes=(3, 2))
        for one in series:
            band = () if one.low is None or one.high is None else (one.low, one.high)
            x, y, *band_xy = thin(one.x, one.y, *band)
            colour = _PALETTE[one.style.colour]
            if band_xy:
                axes.fill_between(x, *band_xy, color=colour, alpha=0.18, linewidth=0)
            (line,) = axes.plot(x, y, color=colour, marker=one.style.marker, markeredgecolor=_PAPER, zorder=3)
            line.set_markeredgewidth(0.6)
            line.set_markevery(None if marks or len(x) < 2 else [len(x) - 1])
            if one.style.dash:
                line.set_dashes([float(part) / 1.7 for part in one.style.dash.split()])
        if xlim is None and len(series) and all(float(v).is_integer() for s in series for v in _array(s.x)[:50]):
            axes.xaxis.set_major_locator(MaxNLocator(5 if small else 6, integer=True, steps=_STEPS))
        if xticks is not None:
            axes.set_xticks(xticks)
        if xlim:
            axes.set_xlim(*xlim)
        if ylim:
            axes.set_ylim(*ylim)
        return _svg(name, figure)


def histogram(name: str, values: Values, xlabel: str, *, outline: Any = None) -> Markup:
    """Number of pairs by value; bins below zero stand out; `outline` draws a second set as steps."""
    with matplotlib.rc_context(_RC):
        figure, axes = _axes(xlabel, "pairs")
        shown = [_finite(values), *([] if outline is None else [_finite(outline)])]
        low, high = min(float(v.min()) for v in shown), max(float(v.max()) for v in shown)
        edges = _edges(low, high)
        counts, _ = np.histogram(shown[0], edges)
        colours = [_BAD if right <= 1e-12 else _PALETTE[0] for right in edges[1:]]
        axes.bar(edges[:-1], counts, np.diff(edges) * 0.92, align="edge", color=colours, linewidth=0)
        if len(shown) > 1:
            other, _ = np.histogram(shown[1], edges)
            axes.stairs(other, edges, color=_INK, linewidth=1.1)
        if low < 0:
            axes.axvline(0, color=_MUTED, linewidth=1)
        axes.grid(False, axis="x")
        return _svg(name, figure)


def bars(name: str, values: Sequence[float], xlabel: str, ylabel: str) -> Markup:
    """One bar for each group 1, 2, ..; those below zero stand out."""
    with matplotlib.rc_context(_RC):
        figure, axes = _axes(xlabel, ylabel)
        colours = [_BAD if value < 0 else _PALETTE[0] for value in values]
        axes.bar(range(1, len(values) + 1), values, 0.8, color=colours, linewidth=0)
        axes.axhline(0, color=_MUTED, linewidth=1)
        axes.grid(False, axis="x")
        axes.set_xlim(0.2, len(values) + 0.8)
        axes.set_xticks(group_ticks(len(values)))
        return _svg(name, figure)


def dots(
    name: str,
    rows: Sequence[str],
    series: Sequence[Series],
    xlabel: str,
    *,
    level: float | None = None,
    spread: bool = False,
    small: bool = False,
) -> Markup:
    """Values with intervals, one line of the plot a row: `series` has x the value and y the row (0 = top).

    `spread` sets several series of one row a little apart.
    """
    with matplotlib.rc_context(_RC):
        labels = [textwrap.fill(_clean(row, 120), 40) for row in rows]  # what tells two rows apart may stand last
        tall = max([1.25 if spread else 1, *(0.6 * (label.count("\n") + 1) for label in labels)])
        figure, axes = _axes(xlabel, "", small, 0.75 + 0.27 * max(len(rows), 2) * tall)
        if level is not None:
            axes.axvline(level, color=_MUTED, linewidth=1, dashes=(3, 2))
        for position, one in enumerate(series):
            shift = 0.5 * ((position + 0.5) / len(series) - 0.5) if spread else 0.0
            x, y = _array(one.x), _array(one.y) + shift
            colour = _PALETTE[one.style.colour]
            if one.low is not None and one.high is not None:
                axes.hlines(y, _array(one.low), _array(one.high), color=colour, linewidth=1.6)
            axes.plot(x, y, color=colour, marker=one.style.marker, linestyle="", markersize=6.5, markeredgecolor=_PAPER)
        if spread:
            axes.grid(False, axis="y")
            axes.hlines(
                np.arange(len(rows) - 1) + 0.5, 0, 1, _GRID, linewidth=0.7, transform=axes.get_yaxis_transform()
            )
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", labelcolor=_INK)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4 if small else 5, steps=_STEPS))
        return _svg(name, figure)


def scatter(name: str, x: Values, y: Values, xlabel: str, ylabel: str, *, wrong: Any = None) -> Markup:
    """One point a pair, rastered; those `wrong` on top in a second colour; the diagonal to compare with."""
    with matplotlib.rc_context(_RC):
        figure, axes = _axes(xlabel, ylabel)
        xs, ys = _array(x), _array(y)
        bad = np.zeros(len(xs), dtype=bool) if wrong is None else np.asarray(wrong, dtype=bool)
        size = float(np.clip(6000 / max(len(xs), 1), 1.5, 14))
        for mask, colour in ((~bad, _RASTER_PLAIN), (bad, _RASTER_BAD)):
            axes.scatter(xs[mask], ys[mask], s=size, c=colour, alpha=0.5, linewidths=0, rasterized=True)
        low, high = float(min(xs.min(), ys.min())), float(max(xs.max(), ys.max()))
        axes.plot([low, high], [low, high], color=_MUTED, linewidth=1, dashes=(3, 2))
        axes.axhline(0, color=_MUTED, linewidth=0.7)
        axes.axvline(0, color=_MUTED, linewidth=0.7)
        return _svg(name, figure)


def clouds(name: str, first: Floats, second: Floats, *, small: bool = False) -> Markup:
    """Two clouds of points (N, 2), rastered, blue and orange; without ticks, for their axes mean nothing."""
    with matplotlib.rc_context(_RC):
        figure, axes = _axes("", "", small)
        # Drawn in turns, so that neither cloud covers the other.
        points = np.stack([first, second], 1).reshape(-1, 2)
        colours = [_RASTER_PLAIN, _RASTER_BAD] * len(first)
        size = float(np.clip(3000 / max(len(points), 1), 2, 14))
        axes.scatter(points[:, 0], points[:, 1], s=size, c=colours, alpha=0.7, linewidths=0, rasterized=True)
        axes.set_xticks([])
        axes.set_yticks([])
        return _svg(name, figure)


def group_ticks(n: int) -> list[int]:
    """Ticks of n groups: 1, 5, 10, ..."""
    return [1, *range(5, n + 1, 5)]


def _axes(xlabel: str, ylabel: str, small: bool = False, height: float | None = None) -> tuple[Figure, Any]:
    size = _SMALL if small else _SIZE
    figure = Figure(figsize=(size[0], height or size[1]), layout="constrained", dpi=150)
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(_clean(xlabel))
    axes.set_ylabel(_clean(ylabel))
    axes.xaxis.set_major_locator(MaxNLocator(5 if small else 6, steps=_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(4 if small else 5, steps=_STEPS))
    return figure, axes


def _array(values: Values) -> Floats:
    return np.array(values, dtype=np.float64)


def _finite(values: Values) -> Floats:
    array = _array(values)
    finite = array[np.isfinite(array)]
    return finite if len(finite) else np.zeros(1)


def _edges(low: float, high: float, bins: int = 48) -> Floats:
    """Equal bins with an edge at zero, so that no bin holds both signs."""
    width = max(high - low, 1e-9) / bins
    first, last = np.floor(low / width), np.ceil(high / width)
    return np.arange(first, max(last, first + 1) + 1) * width


def _clean(text: str, limit: int = 40) -> str:
    """Text that may stand in SVG: no control characters and no lone surrogates; long names cut."""
    printable = "".join(c if c.isprintable() else " " for c in str(text)).encode("utf-8", "replace").decode()
    return printable if len(printable) <= limit else printable[: limit - 1] + "…"


def _svg(name: str, figure: Figure) -> Markup:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's fonts draw the text, not matplotlib's
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"#0000[ab][0-9a-f](?![0-9a-f])", lambda m: _VARIABLES.get(m[0], m[0]), text)
    text = re.sub(r' (?:xmlns(?::\w+)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r' d="[^"]*"', lambda m: re.sub(r"(\d\.\d\d)\d+", r"\1", " ".join(m[0].split("\n"))), text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    prefix = "f" + hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)([\w.-]+)', rf"\g<1>{prefix}\g<2>", text)
    return Markup(re.sub(r"\s*\n\s*", "\n", text).replace("<svg", '<svg class="plot" aria-hidden="true"', 1))
