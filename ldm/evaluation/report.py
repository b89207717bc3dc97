"""Write results as JSON, as a table and as a figure."""

import itertools
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.evaluation.figure_labels import XY, place_labels
from ldm.evaluation.metrics import Estimate
from ldm.evaluation.score import Result
from ldm.runtime.files import replace_when_written

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["format_choices", "format_table", "save_figure", "save_results"]

MARKER_RADIUS = 4.0  # with some space, in points
FAR_DISTANCE = 14.0  # of a label from its marker, at which a line connects them, in points

log = logging.getLogger(__name__)

# name of a score: (heading, factor, decimals)
COLUMNS = {
    "fid": ("FID", 1.0, 3),
    "kid": ("KID × 1000", 1000.0, 3),
    "precision": ("precision", 1.0, 3),
    "recall": ("recall", 1.0, 3),
    "prompt_score": ("prompt score", 1.0, 4),
}


def save_results(results: Sequence[Result], out: Path) -> list[Path]:
    """Write each result as JSON, and the table; return the paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for result in results:
        name = result.series if result.scale is None else f"{result.series}-{result.scale:g}"
        paths.append(out / f"{name.replace('/', '-')}.json")
        _write(paths[-1], json.dumps(result.to_json(), indent=1, default=str) + "\n")
    paths.append(out / "table.md")
    _write(paths[-1], format_table(results) + "\n")
    return paths


def format_table(results: Sequence[Result]) -> str:
    """Return the scores as a Markdown table, with standard errors after ±."""
    names = [name for name in COLUMNS if any(name in result.scores for result in results)]
    judges = {str(r.choices["judge"]["name"]) for r in results if "judge" in r.choices}
    headings = [COLUMNS[name][0] for name in names]
    if len(judges) == 1 and "prompt_score" in names:
        headings[names.index("prompt_score")] = judges.pop()
    lines = [
        "| " + " | ".join(["images", "scale", "N", *headings]) + " |",
        "|" + "---|" * (len(names) + 3),
    ]
    for result in results:
        scale = "" if result.scale is None else f"{result.scale:g}"
        cells = [_format_cell(result.scores.get(name), *COLUMNS[name][1:]) for name in names]
        lines.append("| " + " | ".join([result.series, scale, str(result.count), *cells]) + " |")
    return "\n".join(lines)


def format_choices(result: Result) -> list[str]:
    """Return what the scores depend on besides the images, a line for each network or set."""
    lines = []
    for name, choices in result.choices.items():
        if isinstance(choices, dict):
            values = (f"{key} {value}" for key, value in choices.items() if value is not None)
            lines.append(f"{name}: {', '.join(values)}")
    return lines


def save_figure(results: Sequence[Result], out: Path, *, title: str | None = None) -> list[Path]:
    """Plot FID against the prompt score as SVG and PNG: a line per series, a marker per scale.

    Args:
        title: None = a title that names the scores and the number of images.
    Returns:
        The paths; [] if there is nothing to plot or matplotlib is not installed.
    """
    points = [r for r in results if {"fid", "prompt_score"} <= r.scores.keys()]
    if not points:
        return []
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no figure: matplotlib is not installed (pip install 'ldm-revived[evaluate]')")
        return []
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    labels: list[tuple[str, XY]] = []
    lines: list[tuple[XY, XY]] = []
    for series in dict.fromkeys(result.series for result in points):
        curve = sorted((r for r in points if r.series == series), key=lambda r: r.scale or 0)
        x, y = ([r.scores[score] for r in curve] for score in ("prompt_score", "fid"))
        axes.errorbar(
            [e.value for e in x], [e.value for e in y], xerr=[e.error for e in x],
            yerr=[e.error for e in y], marker="o", markersize=4, capsize=2, linewidth=1.2,
            elinewidth=0.7, label=series,
        )  # fmt: skip
        middles = [(a.value, b.value) for a, b in zip(x, y, strict=True)]
        lines += itertools.pairwise(middles)
        for a, b in zip(x, y, strict=True):
            lines += [
                ((a.value - a.error, b.value), (a.value + a.error, b.value)),
                ((a.value, b.value - b.error), (a.value, b.value + b.error)),
            ]
        labels += [
            (f"{result.scale:g}", middle)
            for result, middle in zip(curve, middles, strict=True)
            if result.scale is not None
        ]
    judge = points[0].choices["judge"]["name"]
    size = points[0].facts.get("size")
    size_note = f" on {size[1]}x{size[0]} samples" if size else ""
    axes.set_xlabel(judge)
    axes.set_ylabel(f"FID ({points[0].choices['features']['name']})")
    axes.set_title(title or f"FID vs {judge}{size_note}, N = {points[0].count}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    _draw_labels(axes, labels, lines)
    paths = [out / "figure.svg", out / "figure.png"]
    for path in paths:
        with replace_when_written(path) as partial:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(partial, format=path.suffix[1:], dpi=110, metadata=metadata)
    return paths


def _draw_labels(
    axes: "Axes", labels: Sequence[tuple[str, XY]], lines: Sequence[tuple[XY, XY]]
) -> None:
    """Draw labels beside their points; a line connects those that are far away."""
    figure = axes.get_figure(root=True)
    if figure is None or not labels:
        return
    figure.draw_without_rendering()  # the layout determines the pixels of the points

    def to_pixels(points: Sequence[XY]) -> list[XY]:
        return [(float(x), float(y)) for x, y in axes.transData.transform(points)]

    points = to_pixels([point for _, point in labels])
    trials = [axes.annotate(text, point, fontsize=8) for text, point in labels]
    sizes = [(box.width, box.height) for box in (trial.get_window_extent() for trial in trials)]
    for trial in trials:
        trial.remove()
    left, bottom, right, top = map(float, axes.get_window_extent().extents)
    pixels = figure.dpi / 72
    ends = to_pixels([end for line in lines for end in line])
    pairs = zip(ends[::2], ends[1::2], strict=True)
    drawn = [pair for pair in pairs if all(map(math.isfinite, pair[0] + pair[1]))]
    centers = place_labels(points, sizes, (left, bottom, right, top), MARKER_RADIUS * pixels, drawn)
    for (text, point), (x, y), center in zip(labels, points, centers, strict=True):
        offset = ((center[0] - x) / pixels, (center[1] - y) / pixels)
        is_far = math.hypot(*offset) > FAR_DISTANCE
        axes.annotate(
            text, point, xytext=offset, textcoords="offset points", fontsize=8, ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "0.5"} if is_far else None,
        )  # fmt: skip


def _format_cell(estimate: Estimate | None, factor: float, decimals: int) -> str:
    if estimate is None:
        return "–"
    return f"{factor * estimate.value:.{decimals}f} ± {factor * estimate.error:.{decimals}f}"


def _write(path: Path, text: str) -> None:
    with replace_when_written(path) as partial:
        partial.write_text(text, "utf-8")
