"""Figures of single images: what a Vision Transformer says of them, and the boxes that a detector finds in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from masa.errors import MasaError
from masa.evaluation import metrics as m
from masa.report.canvas import Canvas
from masa.report.labels import shortened, width_of
from masa.report.style import COLOURS, GREEN, LABEL, SMALLEST, TEXT, VERMILLION, readable
from masa.report.vision_figures import class_names, first_scales

ACROSS = 8
"""Images side by side."""

SHOWN = 0.5
"""Boxes are drawn that a detector is at least this sure of."""


def predictions(spec: Mapping[str, Any], results: Path) -> Figure:
    """Test images with what the model says and how surely; first the first ones, then its surest mistakes.

    One block of lines a data set (its first size of the grid), of the first method.
    """
    blocks = []
    for rows in first_scales(spec, results):
        record = m.load(results, rows[0]["records"][0])
        if not record["examples"]:
            raise _no_examples(results, rows[0])
        for start in range(0, len(record["examples"]), ACROSS):
            blocks.append((rows[0], record, record["examples"][start : start + ACROSS]))
    side = TEXT / ACROSS
    canvas = Canvas(TEXT, (side + 0.18) * len(blocks), len(blocks), ACROSS)
    for axis in canvas.axes.flat:
        axis.axis("off")
    for line, (row, record, examples) in zip(canvas.axes, blocks, strict=True):
        names, tiles = class_names(record), _tiles(results, row)
        size = len(tiles)
        for axis, example in zip(line, examples, strict=False):
            start = example["tile"] * size
            axis.imshow(tiles[:, start : start + size], cmap="gray", interpolation="nearest")
            right = example["label"] == example["prediction"]
            room = 72 * side - 4
            sure = f": {100 * example['top'][0][1]:.0f} %"
            said = shortened(names[example["prediction"]], SMALLEST, room - width_of(sure, SMALLEST)) + sure
            truth = "" if right else "\n" + shortened(f"is {names[example['label']]}", SMALLEST, room)
            colour = readable(GREEN if right else VERMILLION)
            axis.set_title(said + truth, fontsize=SMALLEST, color=colour, pad=2, loc="center")
    scales = ", ".join(dict.fromkeys(row["scale"] for row, _, _ in blocks))
    return canvas.finish(
        spec["title"],
        f"{blocks[0][0]['label']}, {scales}, one seed. Above each image: the class that the model names and how "
        "surely; where that is wrong, the true one.",
    )


def detections(spec: Mapping[str, Any], results: Path) -> Figure:
    """Test images with annotated boxes (white, dashed) and what each method found; one row of images a method."""
    rows = first_scales(spec, results)[0]
    records = [m.load(results, row["records"][0]) for row in rows]
    count = min(ACROSS, min(len(record["examples"]) for record in records))
    if not count:
        raise _no_examples(results, rows[0])
    shown = sorted({box["label"] for record in records for ex in record["examples"][:count] for box in _surest(ex)})
    looks = {label: _box_look(i) for i, label in enumerate(shown)}
    side = TEXT / count
    canvas = Canvas(TEXT, min(side, 1.2) * 1.15 * len(rows), len(rows), count)
    for line, row, record in zip(canvas.axes, rows, records, strict=True):
        tiles = _tiles(results, row)
        size = len(tiles)
        for axis, example in zip(line, record["examples"], strict=False):
            width, height = example["size"]
            start = example["tile"] * size
            axis.imshow(tiles[:, start : start + size], extent=(0, width, height, 0), interpolation="nearest")
            for box in example["truth"]:
                axis.add_patch(_rectangle(box, width, height, color="white", linestyle="--"))
            for box in _surest(example):
                axis.add_patch(_rectangle(box, width, height, **looks[box["label"]]))
            axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(row["label"], fontsize=LABEL)
    names = class_names(records[0])
    handles = [Patch(fill=False, label=names[label], **style) for label, style in looks.items()]
    return canvas.finish(
        spec["title"],
        f"{rows[0]['scale']}, one seed. White, dashed: annotated; coloured: boxes that the model is at least "
        f"{100 * SHOWN:.0f} % sure of.",
        handles=handles,
    )


def _surest(example: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [box for box in example["found"] if box["score"] >= SHOWN]


def _box_look(index: int) -> dict[str, Any]:
    """Colours that are seen on pictures, then the same ones dotted."""
    again, index = divmod(index, len(COLOURS) - 2)
    return {"color": COLOURS[1 + index], "linestyle": ":" if again else "-"}


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


def _no_examples(results: Path, row: Mapping[str, Any]) -> MasaError:
    path = results / row["records"][0] / "metrics.json"
    return MasaError(
        f"{path} has no examples to draw; set vision_evaluation.examples to at least 2 and evaluate again."
    )
