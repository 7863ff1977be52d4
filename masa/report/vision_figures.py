"""Figures of Vision Transformers: accuracy over sizes (Figure 2), confusions, accuracy by class."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from masa.evaluation import metrics as m
from masa.report.canvas import Canvas, of_seeds
from masa.report.labels import End, shortened, width_of
from masa.report.paper import match, published_rows
from masa.report.style import COLUMN, SMALL, SMALLEST, TEXT, look

NAMED = 20
"""Classes are named on axes up to this many."""

_PAPER = {"color": "0.3", "marker": "D", "mfc": "none", "linestyle": ""}


def accuracy_parameters(spec: Mapping[str, Any], results: Path) -> Figure:
    """Top-1 (above) and parameters (below) of every method, sizes across, one column of panels a data set.

    Hollow diamonds are the paper's own values, where it has some. One size of one data set has its methods named
    below the axis and fits one column; several sizes share a legend.
    """
    paper = published_rows(spec.get("paper"))
    columns: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in spec["rows"]:
        records = [m.load(results, record) for record in row["records"]]
        columns.setdefault(records[0]["dataset"], {}).setdefault(row["scale"], []).append(
            _point(row, records, match(row["paper"], paper, spec))
        )
    methods = {row["experiment"]: row["label"] for row in spec["rows"]}
    alone = sum(map(len, columns.values())) == 1
    canvas = Canvas(
        COLUMN if alone else TEXT, 3.0, 2, len(columns), sharex="col",
        gridspec_kw={"width_ratios": [len(sizes) for sizes in columns.values()], "height_ratios": [3, 2]},
    )  # fmt: skip
    axes = canvas.axes
    for (name, sizes), above, below in zip(columns.items(), axes[0], axes[1], strict=True):
        for place, points in enumerate(sizes.values()):
            for point in points:
                _draw_point(point, place, list(methods), above, below)
        sized = [points[0]["size"] for points in sizes.values()]
        above.set_title(f"{name}, {sized[0]} (hidden size / layers)" if alone else name)
        above.margins(y=0.12)
        if alone:
            below.set_xticks([_place(0, i, len(methods)) for i in range(len(methods))])
            below.set_xticklabels(
                [shortened(v, SMALL, 90) for v in methods.values()], rotation=40, ha="right", rotation_mode="anchor"
            )
        else:
            below.set_xticks(range(len(sizes)), sized)
            below.set_xlabel("Hidden size / layers")
        below.set_xlim(-0.5, len(sizes) - 0.5)
        below.yaxis.set_major_formatter(EngFormatter(sep=""))
        for axis in (above, below):
            axis.grid(False, axis="x")
    axes[0][0].set_ylabel("Top-1 accuracy (%)")
    axes[1][0].set_ylabel("Parameters")
    marks = [] if alone else [plt.Line2D([], [], **look(n) | {"linestyle": ""}, label=v) for n, v in methods.items()]
    if any(point["paper"] is not None for sizes in columns.values() for points in sizes.values() for point in points):
        marks.append(plt.Line2D([], [], **_PAPER, label="the paper"))
    images = "± 1 standard error over the test images"
    seeds = of_seeds(len(spec["rows"][0]["records"]), "bars", images)
    return canvas.finish(spec["title"], seeds, "Pale: parameters of attention.", handles=marks)


def _point(row: Mapping[str, Any], records: list[dict[str, Any]], found: Mapping[str, Any]) -> dict[str, Any]:
    flat = [m.flatten(record) for record in records]
    top1 = [f["top1_pct"] for f in flat]
    spread = statistics.stdev(top1) if len(top1) > 1 else m.standard_errors(records[0])["top1_pct_se"]
    return {
        "experiment": row["experiment"],
        "size": f"{row['model']['hidden_size']} / {row['model']['num_layers']}",
        "top1": statistics.fmean(top1),
        "spread": spread,
        "parameters": flat[0]["parameters"],
        "attention": flat[0]["attention_parameters"],
        "paper": found.get("top1_pct"),
    }


def _place(size: int, method: int, methods: int) -> float:
    return size + 0.8 * ((method + 0.5) / methods - 0.5)


def _draw_point(point: Mapping[str, Any], place: int, methods: list[str], above: Any, below: Any) -> None:
    style = look(point["experiment"])
    x = _place(place, methods.index(point["experiment"]), len(methods))
    above.errorbar(
        x, point["top1"], yerr=point["spread"], capsize=1.5, markersize=4, elinewidth=0.8, **style | {"linestyle": ""}
    )
    if point["paper"] is not None:
        above.plot(x, point["paper"], **_PAPER | {"color": style["color"]}, markersize=5)
    width = 0.7 / len(methods)
    below.bar(x, point["parameters"], width=width, color=style["color"])
    below.bar(x, point["attention"], width=width, color="white", alpha=0.55)


def confusion(spec: Mapping[str, Any], results: Path) -> Figure:
    """How often images of one class (down) are taken for another (across), in percent of the class, seeds together.

    A panel a method, three to a line; data sets (their first size of the grid) below one another.
    """
    groups = first_scales(spec, results)
    lines = [rows[i : i + 3] for rows in groups for i in range(0, len(rows), 3)]
    across = max(map(len, lines))
    named = [name for rows in groups for name in _shown_names(m.load(results, rows[0]["records"][0]))]
    names = max((width_of(name, SMALL) / 72 for name in named), default=0.15)
    side = (TEXT - 1.0 - names) / max(across, 2)
    canvas = Canvas(TEXT, (side + names + 0.55) * len(lines), len(lines), across, layout="compressed")
    for line, rows in zip(canvas.axes, lines, strict=True):
        for axis in line[len(rows) :]:
            axis.axis("off")
        for axis, row in zip(line, rows, strict=False):
            records = [m.load(results, record) for record in row["records"]]
            image = _draw_confusion(axis, row, records, 72 * side)
        line[0].set_ylabel(f"True class ({rows[0]['scale']})")
        for axis in line[1:]:
            axis.set_yticklabels([])
    canvas.figure.colorbar(image, ax=list(canvas.axes.flat), label="Share of the class (%)", fraction=0.04, pad=0.02)
    count = len(spec["rows"][0]["records"])
    seeds = f"Images of {count} seeds together" if count > 1 else "One seed"
    written = "Shares below 0.5 % are not written." if any(axis.texts for axis in canvas.axes.flat) else ""
    return canvas.finish(spec["title"], f"{seeds}; no error bars.", written)


def _draw_confusion(axis: Any, row: Mapping[str, Any], records: list[dict[str, Any]], side: float) -> Any:
    """Args: side: of the panel, in points."""
    counts = np.sum([record["classification"]["confusion"] for record in records], axis=0)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    if names := _shown_names(records[0]):
        axis.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0)
        axis.set_yticks(range(len(names)), names)
        if width_of("100", SMALLEST) < 0.9 * side / len(names):
            for y, x in np.argwhere(share >= 0.5):
                colour = "white" if share[y, x] > 55 else "black"
                axis.text(x, y, f"{share[y, x]:.0f}", ha="center", va="center", fontsize=SMALLEST, color=colour)
    accuracy = statistics.fmean(record["classification"]["top1"] for record in records)
    axis.set_title(f"{row['label']}\ntop-1 {100 * accuracy:.1f} %")
    axis.set_xlabel("Predicted class")
    axis.grid(False)
    return image


def per_class(spec: Mapping[str, Any], results: Path) -> Figure:
    """Accuracy of each class, classes sorted by the first method's; with one seed error bars are binomial.

    One panel a data set (its first size of the grid); many classes have no error bars.
    """
    groups = first_scales(spec, results)
    canvas = Canvas(TEXT, 2.2 * len(groups), len(groups))
    classes = []
    for axis, rows in zip(canvas.axes[:, 0], groups, strict=True):
        records = [[m.load(results, record) for record in row["records"]] for row in rows]
        classes.append(len(records[0][0]["classes"]))
        canvas.label_ends(axis, _draw_classes(axis, rows, records))
    what = f"bars (of up to {NAMED} classes)" if max(classes) > NAMED else "bars"
    alone = "± 1 standard error over the test images of the class"
    bars = of_seeds(len(spec["rows"][0]["records"]), what, alone)
    return canvas.finish(spec["title"], bars, "Bars end at 0 and 100 %.")


def _draw_classes(axis: Any, rows: Sequence[Mapping[str, Any]], records: list[list[dict[str, Any]]]) -> list[End]:
    names, ends = _shown_names(records[0][0]), []
    few, count = bool(names), len(records[0][0]["classes"])
    values = [np.array([r["classification"]["per_class"] for r in rs], dtype=float) * 100 for rs in records]
    order = np.argsort(-values[0].mean(0), kind="stable")
    apart = min(0.16, 0.7 / len(rows))
    drawn = {"linestyle": "", "capsize": 1.5, "markersize": 3.5 if few else 1.5, "elinewidth": 0.8}
    for index, (row, value, found) in enumerate(zip(rows, values, records, strict=True)):
        mean = value.mean(0)
        if len(value) > 1:
            error = value.std(0, ddof=1)
        else:
            images = np.maximum(np.sum(found[0]["classification"]["confusion"], axis=1), 1)
            error = np.sqrt(mean * (100 - mean) / images)
        x = np.arange(count) + apart * (index - (len(rows) - 1) / 2)
        cut = np.array([np.minimum(error, mean), np.minimum(error, 100 - mean)])[:, order]
        style = look(row["experiment"])
        axis.errorbar(x, mean[order], yerr=cut if few else None, label=row["label"], **style | drawn)
        ends.append(End(x[-1], mean[order][-1], row["label"], style["color"]))
    axis.set_xlabel("Class" if few else f"{count} classes, sorted")
    if few:
        slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 2 else {}
        axis.set_xticks(range(len(names)), [names[i] for i in order], **slanted)
    axis.set_title(rows[0]["scale"])
    axis.set_ylabel("Accuracy (%)")
    return ends


def first_scales(spec: Mapping[str, Any], results: Path) -> list[list[Mapping[str, Any]]]:
    """The rows of the first size of every data set."""
    scales: dict[str, str] = {}
    for row in spec["rows"]:
        scales.setdefault(m.load(results, row["records"][0])["dataset"], row["scale"])
    return [[row for row in spec["rows"] if row["scale"] == scale] for scale in scales.values()]


def class_names(record: Mapping[str, Any]) -> list[str]:
    """Names of the classes for people; of several for one class, the first."""
    return [str(name).partition(",")[0] for name in record.get("titles") or record["classes"]]


def _shown_names(record: Mapping[str, Any]) -> list[str]:
    """Names for an axis, cut to 45 points; none where there are too many."""
    names = class_names(record)
    return [shortened(name, SMALL, 45) for name in names] if len(names) <= NAMED else []
