"""The charts of a run's report, as inline SVG drawn by matplotlib.

Text stays text (selectable, searchable, any script) and every colour is a CSS variable of the page, so one drawing
serves light, dark and print. The same figures give the same bytes on every run.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator

# Colours as matplotlib draws them; each becomes the CSS variable ``--<name>`` in the page, which picks the real shade.
COLOURS = {
    "ink": "#10203a",
    "quiet": "#6a7383",
    "grid": "#e2e5ea",
    "federated": "#1d5fbf",
    "local": "#c8551b",
    "centralised": "#3f8f6b",
    "train": "#274c77",
    "evaluate": "#6f9bc9",
    "encode": "#7a4fa3",
    "tag": "#9b6fc4",
    "mask": "#8f2d56",
    "encrypt": "#b0467f",
    "shares": "#d07fa8",
    "aggregate": "#d98b2b",
    "unmask": "#a8641a",
    "decrypt": "#e4b363",
    "apply": "#8a9a5b",
    "epsilon": "#6b4fb3",
}
PHASES = ("train", "evaluate", "encode", "tag", "mask", "encrypt", "shares", "aggregate", "unmask", "decrypt", "apply")
COORDINATOR_PHASES = ("aggregate", "unmask")
MAX_TURNS = 9  # more labelled rounds than this crowd a small chart

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 11.0,
    "axes.edgecolor": COLOURS["quiet"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": COLOURS["quiet"],
    "ytick.color": COLOURS["quiet"],
    "text.color": COLOURS["ink"],
}

# Text a little to the right of a point, even outside the axes.
_BESIDE: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "annotation_clip": False}
_BAR_BOX = (0.005, 0.0, 0.8, 1.0)

Lines = Sequence[tuple[str, str, Sequence[float | None]]]  # label, colour name, value for each round


def lines_by_round(
    name: str,
    title: str,
    lines: Lines,
    *,
    top: float | None = None,
    width: float = 4.6,
    label_share: float = 0.22,
    stages: Sequence[tuple[int, str]] = (),
) -> str:
    """Draw one chart: a line per entry of ``lines`` over the rounds, labelled at its end; the vertical axis has its 0.

    Args:
        name: unique in the page; prefixes the identifiers inside the drawing.
        title: the text alternative.
        lines: label, colour name and one value for each round (None where nothing was measured).
        top: upper limit of the vertical axis; None leaves it to the data.
        width: inches at 72 points.
        label_share: share of the width kept for the labels.
        stages: first value and name of each stage, where there are several: what is measured is not the same in them, so
            lines are broken where one begins, and the name is written there.

    Returns:
        An ``<svg>`` element.
    """

    def draw(axes: Axes) -> None:
        breaks = [first for first, _ in stages]
        ends = [_draw_line(axes, values, colour=colour, breaks=breaks) for _, colour, values in lines]
        # headroom, so that a line at the very top keeps its full width and its dot
        axes.set_ylim(0, 1.03 * (axes.get_ylim()[1] if top is None else top))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=MAX_TURNS, integer=True))
        axes.yaxis.set_major_locator(MultipleLocator(top / 4) if top else MaxNLocator(nbins=4))
        axes.grid(axis="y", color=COLOURS["grid"], linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("round", color=COLOURS["quiet"], labelpad=2)
        for first, name_of_stage in stages:
            _mark_stage(axes, first, name_of_stage)
        _label_ends(axes, [(label, colour, end) for (label, colour, _), end in zip(lines, ends, strict=True) if end])

    box = (0.4 / width, 0.19, 1 - label_share - 0.4 / width, 0.77)
    return _svg(name, title, draw, size=(width, 2.3), box=box)


def stacked_bars(name: str, title: str, bars: Sequence[tuple[str, Mapping[str, float], str]]) -> str:
    """Draw one horizontal bar per entry: label, seconds by phase (in the order of :data:`PHASES`), the sum in words."""

    def draw(axes: Axes) -> None:
        for row, (label, parts, words) in enumerate(bars):
            start = 0.0
            for phase in PHASES:
                if parts.get(phase):
                    axes.barh(row, parts[phase], left=start, height=0.34, color=COLOURS[phase], linewidth=0)
                    start += parts[phase]
            _bar_text(axes, row, label, words, end=start)
        _bar_axes(axes, rows=len(bars), longest=max(sum(parts.values()) for _, parts, _ in bars))

    return _svg(name, title, draw, size=(5.2, 0.55 * len(bars)), box=_BAR_BOX)


def plain_bars(name: str, title: str, bars: Sequence[tuple[str, float, str, str]]) -> str:
    """Draw one horizontal bar per entry: label, length, the length in words, colour name."""

    def draw(axes: Axes) -> None:
        for row, (label, length, words, colour) in enumerate(bars):
            axes.barh(row, length, height=0.34, color=COLOURS[colour], linewidth=0)
            _bar_text(axes, row, label, words, end=length)
        _bar_axes(axes, rows=len(bars), longest=max(length for _, length, _, _ in bars))

    return _svg(name, title, draw, size=(5.2, 0.55 * len(bars)), box=_BAR_BOX)


def spread(heights: Sequence[float], *, low: float, high: float, gap: float) -> list[float]:
    """Move ascending ``heights`` as little as keeps neighbours ``gap`` apart, first upwards, then below ``high``.

    >>> spread([1.0, 5.0, 5.0], low=0.0, high=6.0, gap=2.0)
    [1.0, 4.0, 6.0]
    """
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap if placed else low))
    ceiling = high
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def _draw_line(
    axes: Axes, values: Sequence[float | None], *, colour: str, breaks: Sequence[int] = ()
) -> tuple[float, float] | None:
    """Draw a line with a dot at its end; return the end, or None if there is nothing to draw."""
    points = [(float(turn), value) for turn, value in enumerate(values) if value is not None]
    if not points:
        return None
    strong = colour == "federated"
    turns, heights = zip(*points, strict=True)
    if colour == "quiet":  # a limit, not a measurement
        axes.plot(turns, heights, color=COLOURS[colour], linewidth=1.2, linestyle=(0, (4, 3)))
        return points[-1]
    for part in _parts(points, breaks):
        axes.plot(
            *zip(*part, strict=True), color=COLOURS[colour], linewidth=2.6 if strong else 1.6, zorder=4 if strong else 3
        )
    axes.plot(turns[-1:], heights[-1:], "o", color=COLOURS[colour], markersize=5 if strong else 4, zorder=5)
    return points[-1]


def _parts(points: Sequence[tuple[float, float]], breaks: Sequence[int]) -> list[list[tuple[float, float]]]:
    """Points before, between and from the breaks on; parts without points are left out."""
    edges = [-math.inf, *sorted(breaks), math.inf]
    parts = ([point for point in points if low <= point[0] < high] for low, high in pairwise(edges))
    return [part for part in parts if part]


def _mark_stage(axes: Axes, first: int, name: str) -> None:
    """A line before the first value of a stage, and its name at the top."""
    if first:
        axes.axvline(first - 0.5, color=COLOURS["quiet"], linewidth=0.8, linestyle=(0, (2, 2)))
    at = (max(first - 0.5, axes.get_xlim()[0]), axes.get_ylim()[1])
    axes.annotate(name, at, color=COLOURS["quiet"], fontsize=9, va="top", xytext=(4, -1), textcoords="offset points")


def _label_ends(axes: Axes, ends: Iterable[tuple[str, str, tuple[float, float]]]) -> None:
    """Write each line's label right of the chart, at the height of its end, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    ordered = sorted(ends, key=lambda entry: entry[2][1])
    heights = spread([height for _, _, (_, height) in ordered], low=low, high=high, gap=0.115 * (high - low))
    for (label, colour, _), height in zip(ordered, heights, strict=True):
        at = (right, height)
        axes.annotate(label, at, color=COLOURS[colour], va="center", **_BESIDE)


def _bar_text(axes: Axes, row: int, label: str, words: str, *, end: float) -> None:
    axes.annotate(label, (0, row - 0.24), va="bottom")
    axes.annotate(words, (end, row), va="center", color=COLOURS["quiet"], **_BESIDE)


def _bar_axes(axes: Axes, *, rows: int, longest: float) -> None:
    axes.set_xlim(0, longest or 1.0)
    axes.set_ylim(rows - 0.7, -0.75)
    axes.set_axis_off()


def _svg(
    name: str,
    title: str,
    draw: Callable[[Axes], None],
    *,
    size: tuple[float, float],
    box: tuple[float, float, float, float],
) -> str:
    """Return the ``<svg>`` that ``draw`` makes.

    Args:
        name: unique in the page.
        title: the text alternative.
        draw: puts the marks on the axes.
        size: width and height, inches at 72 points.
        box: left, bottom, width and height of the axes, as shares of the size.
    """
    settings: Any = {**_SETTINGS, "svg.hashsalt": name}
    with rc_context(settings), warnings.catch_warnings():
        # Text is set in the reader's fonts; that the font used for measuring here lacks a character does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=size)
        figure.patch.set_visible(False)
        axes = figure.add_axes(box)
        axes.patch.set_visible(False)
        axes.tick_params(length=0, labelsize=10)
        draw(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_page(name, title, stream.getvalue())


def _for_page(name: str, title: str, drawing: str) -> str:
    """Make a stand-alone drawing part of a page: no prologue, unique identifiers, page fonts, page colours."""
    body = drawing[drawing.index("<svg") :]
    head, body = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    body = re.sub(r"font: [^;\"]*px [^;\"]*", lambda found: _font_size(found[0]), body)
    body = re.sub(r"font-family: [^;\"]*;?\s*", "", body)
    used = set(re.findall(r"(?:href=\"|url\()#([\w-]+)", body))
    body = re.sub(r' id="([\w.-]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r"(href=\"|url\()#", rf"\g<1>#{name}-", body)
    for colour, drawn in COLOURS.items():
        body = body.replace(f": {drawn}", f": var(--{colour})")
    label = escape(title, quote=True)
    return f'<svg {box[0] if box else ""} role="img" aria-label="{label}" class="chart"><title>{label}</title>{body}'


def _font_size(font: str) -> str:
    """Reduce a ``font`` shorthand to its size; the family comes from the page."""
    size = re.search(r"([\d.]+px)", font)
    return f"font-size: {size[1] if size else '11px'}"
