"""Write scores as JSON, as a table and as a figure."""

import itertools
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ldm.evaluation.figure_labels import Point, place_labels
from ldm.evaluation.metrics import Estimate
from ldm.evaluation.score import Result
from ldm.runtime.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["format_score_settings", "format_table", "save_figure", "save_results"]

MARKER_RADIUS = 4.0  # in points, including some space around the marker
MAX_LABEL_DISTANCE = 14.0  # in points, from the marker; a line connects labels that are farther

log = logging.getLogger(__name__)


class Column(NamedTuple):
    """Format of a score in the table; values are multiplied by `factor`."""

    heading: str
    factor: float = 1.0
    decimals: int = 3


# By the name of the score
COLUMNS = {
    "fid": Column("FID"),
    "kid": Column("KID × 1000", factor=1000.0),
    "precision": Column("precision"),
    "recall": Column("recall"),
    "prompt_score": Column("prompt score", decimals=4),
}


def save_results(results: Sequence[Result], outdir: Path) -> list[Path]:
    """Write a JSON file for each result, and the table; return the paths."""
    outdir.mkdir(parents=True, exist_ok=True)
    paths = []
    for result in results:
        name = result.series if result.scale is None else f"{result.series}-{result.scale:g}"
        paths.append(outdir / f"{name.replace('/', '-')}.json")
        _write_text(paths[-1], json.dumps(result.to_json(), indent=1, default=str) + "\n")
    paths.append(outdir / "table.md")
    _write_text(paths[-1], format_table(results) + "\n")
    return paths


def format_table(results: Sequence[Result]) -> str:
    """Return the scores as a Markdown table, with standard errors after ±."""
    names = [name for name in COLUMNS if any(name in result.scores for result in results)]
    headings = [COLUMNS[name].heading for name in names]
    scorers = {_get_scorer_name(r) for r in results if "prompt_scorer" in r.score_settings}
    if len(scorers) == 1 and "prompt_score" in names:
        headings[names.index("prompt_score")] = scorers.pop()
    lines = [
        "| " + " | ".join(["images", "scale", "N", *headings]) + " |",
        "|" + "---|" * (len(names) + 3),
    ]
    for result in results:
        scale = "" if result.scale is None else f"{result.scale:g}"
        cells = [_format_cell(result.scores.get(name), COLUMNS[name]) for name in names]
        lines.append("| " + " | ".join([result.series, scale, str(result.count), *cells]) + " |")
    return "\n".join(lines)


def format_score_settings(result: Result) -> list[str]:
    """Format `Result.score_settings`, one line for each network or set of images."""
    lines = []
    for name, settings in result.score_settings.items():
        if isinstance(settings, dict):
            values = (f"{key} {value}" for key, value in settings.items() if value is not None)
            lines.append(f"{name}: {', '.join(values)}")
    return lines


def save_figure(results: Sequence[Result], outdir: Path, *, title: str | None = None) -> list[Path]:
    """Plot FID against the prompt score as SVG and PNG: a line per series, a marker per scale.

    Args:
        title: Title of the figure; None = the scores and the number of images.

    Returns:
        The paths; [] if there is nothing to plot or matplotlib is not installed.
    """
    plotted = [r for r in results if {"fid", "prompt_score"} <= r.scores.keys()]
    if not plotted:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no figure: matplotlib is not installed (pip install 'ldm-revived[evaluate]')")
        return []
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    labels: list[tuple[str, Point]] = []
    lines: list[tuple[Point, Point]] = []
    for series in dict.fromkeys(result.series for result in plotted):
        curve = sorted((r for r in plotted if r.series == series), key=lambda r: r.scale or 0)
        x, y = ([r.scores[score] for r in curve] for score in ("prompt_score", "fid"))
        axes.errorbar(
            [e.value for e in x], [e.value for e in y], xerr=[e.standard_error for e in x],
            yerr=[e.standard_error for e in y], marker="o", markersize=4, capsize=2, linewidth=1.2,
            elinewidth=0.7, label=series,
        )  # fmt: skip
        points = [(a.value, b.value) for a, b in zip(x, y, strict=True)]
        lines += itertools.pairwise(points)
        for a, b in zip(x, y, strict=True):  # the error bars
            lines += [
                ((a.value - a.standard_error, b.value), (a.value + a.standard_error, b.value)),
                ((a.value, b.value - b.standard_error), (a.value, b.value + b.standard_error)),
            ]
        labels += [
            (f"{result.scale:g}", point)
            for result, point in zip(curve, points, strict=True)
            if result.scale is not None
        ]
    first = plotted[0]
    scorer_name = _get_scorer_name(first)
    size = first.generation_info.get("size")
    sample_size = f" on {size[1]}x{size[0]} samples" if size else ""
    axes.set_xlabel(scorer_name)
    axes.set_ylabel(f"FID ({first.score_settings['features']['name']})")
    axes.set_title(title or f"FID vs {scorer_name}{sample_size}, N = {first.count}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    _draw_labels(axes, labels, lines)
    paths = [outdir / "figure.svg", outdir / "figure.png"]
    for path in paths:
        with write_atomically(path) as partial:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(partial, format=path.suffix[1:], dpi=110, metadata=metadata)
    return paths


def _draw_labels(
    axes: "Axes", labels: Sequence[tuple[str, Point]], lines: Sequence[tuple[Point, Point]]
) -> None:
    """Draw labels beside their points, and a line from each distant label to its point."""
    figure = axes.get_figure(root=True)
    if figure is None or not labels:
        return
    figure.draw_without_rendering()  # computes the layout, on which the pixel positions depend

    def to_pixels(points: Sequence[Point]) -> list[Point]:
        return [(float(x), float(y)) for x, y in axes.transData.transform(points)]

    points = to_pixels([point for _, point in labels])
    # Each label is drawn and removed to measure its size.
    annotations = [axes.annotate(text, point, fontsize=8) for text, point in labels]
    boxes = [annotation.get_window_extent() for annotation in annotations]
    for annotation in annotations:
        annotation.remove()
    sizes = [(box.width, box.height) for box in boxes]
    left, bottom, right, top = map(float, axes.get_window_extent().extents)
    pixels_per_point = figure.dpi / 72
    endpoints = to_pixels([endpoint for line in lines for endpoint in line])
    pixel_lines = zip(endpoints[::2], endpoints[1::2], strict=True)
    finite_lines = [
        (start, end) for start, end in pixel_lines if all(map(math.isfinite, start + end))
    ]
    radius = MARKER_RADIUS * pixels_per_point
    centers = place_labels(points, sizes, (left, bottom, right, top), radius, finite_lines)
    for (text, point), (x, y), center in zip(labels, points, centers, strict=True):
        offset = ((center[0] - x) / pixels_per_point, (center[1] - y) / pixels_per_point)
        is_far = math.hypot(*offset) > MAX_LABEL_DISTANCE
        axes.annotate(
            text, point, xytext=offset, textcoords="offset points", fontsize=8, ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "0.5"} if is_far else None,
        )  # fmt: skip


def _format_cell(estimate: Estimate | None, column: Column) -> str:
    if estimate is None:
        return "–"
    value, error = column.factor * estimate.value, column.factor * estimate.standard_error
    return f"{value:.{column.decimals}f} ± {error:.{column.decimals}f}"


def _get_scorer_name(result: Result) -> str:
    return str(result.score_settings["prompt_scorer"]["name"])


def _write_text(path: Path, text: str) -> None:
    with write_atomically(path) as partial:
        partial.write_text(text, "utf-8")
