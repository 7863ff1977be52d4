"""Perplexity against bytes of the file: kinds of storage as lines, types of one size each as points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from masa.errors import MasaError
from masa.evaluation import metrics as m
from masa.report.canvas import Canvas
from masa.report.compression_figures import NAMES, ticks
from masa.report.style import TEXT, look

HIGHEST = 2.5
"""Perplexities are drawn up to this multiple of the first row's."""


def perplexity_bytes(spec: Mapping[str, Any], results: Path) -> Figure:
    """One row of panels a model, one column a text.

    Raises:
        MasaError: a run whose files were not counted.
    """
    models = list(dict.fromkeys(row["scale"] for row in spec["rows"]))
    lines: dict[str, dict[str, list[tuple[float, Mapping[str, Any]]]]] = {model: {} for model in models}
    for row in spec["rows"]:
        record = m.load(results, row["records"][0])
        if not record.get("storage"):
            raise MasaError(f"{row['experiment']} has no bytes of a file: give its compression a `storage`.")
        point = record["storage"]["file_bytes"] / 1e6, record["texts"]
        lines[row["scale"]].setdefault(row["experiment"], []).append(point)
    labels = {row["experiment"]: row["label"] for row in spec["rows"]}
    texts = list(next(iter(lines[models[0]].values()))[0][1])
    canvas = Canvas(TEXT, 2.6 * len(models), len(models), len(texts), sharex=True)
    for axes, model in zip(canvas.axes, models, strict=True):
        for axis, text in zip(axes, texts, strict=True):
            series = {n: [(x, t[text]["token_perplexity"]) for x, t in points] for n, points in lines[model].items()}
            _panel(axis, series)
            axis.set_title(f"{model}: {NAMES.get(text, text)}" if len(models) > 1 else NAMES.get(text, text))
        axes[0].set_ylabel("Perplexity per token (log scale)")
    for axis in canvas.axes[-1]:
        axis.set_xlabel("File (MB)")
    handles = [
        Line2D([], [], label=labels[name], **_drawn(name, points))
        for name, points in next(iter(lines.values())).items()
    ]
    note = f"Bytes are those of whole files. What is above {HIGHEST:g} times the first point is not drawn."
    return canvas.finish(spec["title"], note, "One calibration; no error bars.", handles=handles)


def _drawn(name: str, points: Sequence[Any]) -> dict[str, Any]:
    """The look of a series: one point has no line."""
    return look(name) | ({"linestyle": ""} if len(points) == 1 else {})


def _panel(axis: Any, series: Mapping[str, list[tuple[float, float]]]) -> None:
    first = next(iter(series.values()))[0][1]
    lowest, highest = min(y for points in series.values() for _, y in points), HIGHEST * first
    for name, points in series.items():
        if seen := sorted((x, y) for x, y in points if y <= highest):
            axis.plot([x for x, _ in seen], [y for _, y in seen], **_drawn(name, points))
    axis.set_yscale("log")
    axis.set_ylim(0.97 * lowest, highest)
    found = ticks(0.97 * lowest, highest)
    axis.set_yticks(found, [f"{t:g}" for t in found])
    axis.yaxis.set_minor_locator(NullLocator())
