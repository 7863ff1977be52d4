"""Figures of Vision Transformers: accuracy over sizes (Figure 2), confusions, accuracy by class, predictions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from masa.errors import MasaError
from masa.report import metrics as m
from masa.report.paper import match, published_rows
from masa.report.style import COLOURS, look

NAMED = 20
"""Classes are named on axes up to this many."""

SHOWN = 0.5
"""Boxes are drawn that a detector is at least this sure of."""


def accuracy_parameters(spec: Mapping[str, Any], results: Path) -> Figure:
    """Top-1 (above) and parameters (below) of every method, sizes across, one column of panels a data set.

    Hollow diamonds are the paper's own values, where it has some.
    """
    paper = published_rows(spec.get("paper"))
    columns: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in spec["rows"]:
        records = [m.load(results, record) for record in row["records"]]
        columns.setdefault(records[0]["dataset"], {}).setdefault(row["scale"], []).append(
            _point(row, records, match(row["paper"], paper, spec))
        )
    methods = {row["experiment"]: row["label"] for row in spec["rows"]}
    widths = [max(len(methods) * len(sizes) * 0.16, 1.6) for sizes in columns.values()]
    figure, axes = plt.subplots(
        2, len(columns), figsize=(sum(widths) + 2.6, 4.2), sharex="col", squeeze=False,
        gridspec_kw={"width_ratios": widths, "height_ratios": [3, 2]},
    )  # fmt: skip
    for (name, sizes), above, below in zip(columns.items(), axes[0], axes[1], strict=True):
        for place, points in enumerate(sizes.values()):
            for point in points:
                _draw_point(point, place, list(methods), above, below)
        above.set_title(name)
        above.margins(y=0.12)
        below.set_xticks(range(len(sizes)), [points[0]["size"] for points in sizes.values()])
        below.set_xlim(-0.5, len(sizes) - 0.5)
        below.set_xlabel("hidden size / layers")
        below.yaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        for axis in (above, below):
            axis.grid(False, axis="x")
    axes[0][0].set_ylabel("Top-1 accuracy (%)")
    axes[1][0].set_ylabel("Parameters\n(pale: attention)")
    marks = [plt.Line2D([], [], **look(n, i) | {"linestyle": ""}, label=v) for i, (n, v) in enumerate(methods.items())]
    if any(point["paper"] is not None for sizes in columns.values() for points in sizes.values() for point in points):
        marks.append(plt.Line2D([], [], color="0.3", marker="D", mfc="none", linestyle="", label="the paper"))
    axes[0][-1].legend(handles=marks, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    bars = (
        "± 1 standard deviation over seeds" if len(spec["rows"][0]["records"]) > 1 else "± 1 standard error, one seed"
    )
    figure.suptitle(f"{spec['title']} ({bars})", fontsize=8)
    figure.tight_layout()
    return figure


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


def _draw_point(point: Mapping[str, Any], place: int, methods: list[str], above: Any, below: Any) -> None:
    index = methods.index(point["experiment"])
    style = look(point["experiment"], index)
    x = place + 0.8 * ((index + 0.5) / len(methods) - 0.5)
    above.errorbar(
        x, point["top1"], yerr=point["spread"], capsize=2, markersize=4.5, elinewidth=0.9,
        **style | {"linestyle": ""},
    )  # fmt: skip
    if point["paper"] is not None:
        above.plot(x, point["paper"], color=style["color"], marker="D", mfc="none", markersize=6, linestyle="")
    width = 0.7 / len(methods)
    below.bar(x, point["parameters"], width=width, color=style["color"])
    below.bar(x, point["attention"], width=width, color="white", alpha=0.55)


def confusion(spec: Mapping[str, Any], results: Path) -> Figure:
    """How often images of one class (down) are taken for another (across), in percent of the class, seeds together.

    One line of panels a data set (its first size of the grid), one panel a method.
    """
    groups = _first_scales(spec, results)
    across = max(map(len, groups))
    figure, axes = plt.subplots(
        len(groups), across, figsize=(3.4 * across + 0.4, 3.3 * len(groups)), squeeze=False, sharey="row"
    )
    for line, rows in zip(axes, groups, strict=True):
        for axis in line[len(rows) :]:
            axis.axis("off")
        for axis, row in zip(line, rows, strict=False):
            records = [m.load(results, record) for record in row["records"]]
            image = _draw_confusion(axis, row, records)
        line[0].set_ylabel(f"True class ({rows[0]['scale']})")
    figure.colorbar(image, ax=axes.ravel().tolist(), label="% of the class", fraction=0.04, pad=0.02)
    figure.suptitle(spec["title"], fontsize=8)
    return figure


def _draw_confusion(axis: Any, row: Mapping[str, Any], records: list[dict[str, Any]]) -> Any:
    counts = np.sum([record["classification"]["confusion"] for record in records], axis=0)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    names = _names(records[0])
    if len(names) <= NAMED:
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
        for y, x in np.argwhere(share >= 0.5):
            colour = "white" if share[y, x] > 55 else "black"
            axis.text(x, y, f"{share[y, x]:.0f}", ha="center", va="center", fontsize=5, color=colour)
    accuracy = statistics.fmean(record["classification"]["top1"] for record in records)
    axis.set_title(f"{row['label']}, top-1 {100 * accuracy:.1f} %")
    axis.set_xlabel("Predicted class")
    axis.grid(False)
    return image


def per_class(spec: Mapping[str, Any], results: Path) -> Figure:
    """Accuracy of each class, classes sorted by the first method's; with one seed error bars are binomial.

    One panel a data set (its first size of the grid).
    """
    groups = _first_scales(spec, results)
    most = max(len(m.load(results, rows[0]["records"][0])["classes"]) for rows in groups)
    size = (min(1.6 + 0.42 * most, 7.2), 0.4 + 2.4 * len(groups))
    figure, axes = plt.subplots(len(groups), 1, figsize=size, squeeze=False)
    for axis, rows in zip(axes[:, 0], groups, strict=True):
        _draw_classes(axis, rows, [[m.load(results, record) for record in row["records"]] for row in rows])
    axes[0][0].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    bars = "± 1 standard deviation over seeds" if len(spec["rows"][0]["records"]) > 1 else "± 1 standard error"
    figure.suptitle(f"{spec['title']} ({bars})", fontsize=8)
    figure.tight_layout()
    return figure


def _draw_classes(axis: Any, rows: list[Mapping[str, Any]], records: list[list[dict[str, Any]]]) -> None:
    names = _names(records[0][0])
    values = [np.array([r["classification"]["per_class"] for r in rs], dtype=float) * 100 for rs in records]
    order = np.argsort(-values[0].mean(0), kind="stable")
    for index, (row, value, found) in enumerate(zip(rows, values, records, strict=True)):
        mean = value.mean(0)
        if len(value) > 1:
            error = value.std(0, ddof=1)
        else:
            images = np.maximum(np.sum(found[0]["classification"]["confusion"], axis=1), 1)
            error = np.sqrt(mean * (100 - mean) / images)
        x = np.arange(len(names)) + 0.16 * (index - (len(rows) - 1) / 2)
        style = look(row["experiment"], index) | {"linestyle": "", "capsize": 1.5, "markersize": 3.5, "elinewidth": 0.8}
        axis.errorbar(x, mean[order], yerr=error[order], label=row["label"], **style)
    if len(names) <= NAMED:
        axis.set_xticks(range(len(names)), [names[i] for i in order], rotation=45, ha="right")
    else:
        axis.set_xlabel(f"{len(names)} classes, sorted")
    axis.set_title(rows[0]["scale"], loc="left")
    axis.set_ylabel("Accuracy (%)")


def predictions(spec: Mapping[str, Any], results: Path) -> Figure:
    """Test images with what the model says and how surely; first the first ones, then its surest mistakes.

    One block of lines a data set (its first size of the grid), of the first method.
    """
    across = 8
    blocks = []
    for rows in _first_scales(spec, results):
        record = m.load(results, rows[0]["records"][0])
        for start in range(0, len(record["examples"]), across):
            blocks.append((rows[0], record, record["examples"][start : start + across]))
    figure, axes = plt.subplots(len(blocks), across, figsize=(7.0, 1.25 * len(blocks) + 0.5), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, (row, record, examples) in zip(axes, blocks, strict=True):
        names, tiles = _names(record), _tiles(results, row)
        size = len(tiles)
        for axis, example in zip(line, examples, strict=False):
            start = example["tile"] * size
            axis.imshow(tiles[:, start : start + size], cmap="gray", interpolation="nearest")
            right = example["label"] == example["prediction"]
            said = f"{names[example['prediction']]} ({100 * example['top'][0][1]:.0f} %)"
            truth = "" if right else f"\nis {names[example['label']]}"
            axis.set_title(said + truth, fontsize=6, color=COLOURS[3] if right else COLOURS[4], pad=2)
    scales = ", ".join(dict.fromkeys(row["scale"] for row, _, _ in blocks))
    figure.suptitle(f"{spec['title']} ({blocks[0][0]['label']}, {scales})", fontsize=8)
    figure.tight_layout()
    return figure


def detections(spec: Mapping[str, Any], results: Path) -> Figure:
    """Test images with annotated boxes (white, dashed) and what each method found; one row of images a method."""
    rows = _first_scales(spec, results)[0]
    records = [m.load(results, row["records"][0]) for row in rows]
    count = len(records[0]["examples"])
    figure, axes = plt.subplots(len(rows), count, figsize=(1.3 * count, 1.45 * len(rows) + 0.6), squeeze=False)
    for line, row, record in zip(axes, rows, records, strict=True):
        tiles, names = _tiles(results, row), _names(record)
        size, width, height = len(tiles), 1.0, 1.0
        for axis, example in zip(line, record["examples"], strict=True):
            width, height = example["size"]
            start = example["tile"] * size
            axis.imshow(tiles[:, start : start + size], extent=(0, width, height, 0), interpolation="nearest")
            for box in example["truth"]:
                axis.add_patch(_rectangle(box, width, height, color="white", linestyle="--"))
            surest = [box for box in example["found"] if box["score"] >= SHOWN]
            for box in surest:
                colour = COLOURS[1 + box["label"] % (len(COLOURS) - 1)]
                axis.add_patch(_rectangle(box, width, height, color=colour, linestyle="-"))
                x, y = box["box"][0] * width, box["box"][1] * height
                axis.text(x, y, f"{names[box['label']]} {100 * box['score']:.0f}", fontsize=4.5, color=colour)
            axis.set_xlim(0, width)
            axis.set_ylim(height, 0)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
        line[0].set_ylabel(row["label"])
    legend = f"white: annotated, coloured: at least {SHOWN:.0%} sure"
    figure.suptitle(f"{spec['title']} ({rows[0]['scale']}; {legend})", fontsize=8)
    figure.tight_layout()
    return figure


def _rectangle(box: Mapping[str, Any], width: float, height: float, **style: Any) -> Any:
    x, y, w, h = box["box"]
    return plt.Rectangle((x * width, y * height), w * width, h * height, fill=False, linewidth=0.9, **style)


def _tiles(results: Path, row: Mapping[str, Any]) -> np.ndarray:
    """The pixels of a run's examples, square tiles side by side."""
    path = results / row["records"][0] / "examples.png"
    try:
        return plt.imread(path)
    except (OSError, SyntaxError) as error:
        raise MasaError(f"{path} is missing or corrupt ({error}); evaluate the run again.") from error


def _first_scales(spec: Mapping[str, Any], results: Path) -> list[list[Mapping[str, Any]]]:
    """The rows of the first size of every data set."""
    scales: dict[str, str] = {}
    for row in spec["rows"]:
        scales.setdefault(m.load(results, row["records"][0])["dataset"], row["scale"])
    return [[row for row in spec["rows"] if row["scale"] == scale] for scale in scales.values()]


def _names(record: Mapping[str, Any]) -> list[str]:
    """Names of the classes for people."""
    return [str(name) for name in record.get("titles") or record["classes"]]
