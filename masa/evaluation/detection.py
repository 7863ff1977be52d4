"""Evaluate a detector's run: COCO's mean average precisions and example boxes of the model as its folder is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from masa.data.boxed_images import BoxSplit, check_fits, read_manifest
from masa.data.pixels import check_trained_on
from masa.errors import unknown
from masa.evaluation import analysis
from masa.evaluation.detections import Detections, detect
from masa.models import detector
from masa.runs import run
from masa.runs.files import whole_file

SETTINGS: dict[str, Any] = {"split": "test", "limit": None, "batch_size": 64, "examples": 16, "boxes": 10}
"""Defaults: which split is scored, how many of its images (None: all), how many examples are drawn (the first half
of them: a detector has no surest mistakes), and how many of their boxes are kept."""


def evaluate(run_dir: Path, boxes: Path, settings: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Write ``metrics.json``, ``weights.json`` and ``examples.png`` into ``out``.

    ``metrics.json`` holds parameters, training and ``detection`` (:meth:`.detections.Detections.scores_of`), the
    names of the classes and ``examples``: the first images of the split, which stand side by side in ``examples.png``,
    with their annotated boxes and the ones that the model is surest of. Boxes of examples are (x, y, width, height) as
    parts of the image, so that they fit the tiles; scores are computed in pixels of the original images.

    Args:
        run_dir: a finished run (:func:`masa.training.detection.pretrain`).
        boxes: what it was trained on.
        settings: any of :data:`SETTINGS`.

    Raises:
        MasaError: an incomplete run, boxes that do not fit it, or an unknown setting or split.
    """
    for key in settings:
        if key not in SETTINGS:
            raise unknown("Detection: setting", key, SETTINGS)
    settings = SETTINGS | dict(settings)
    record, spec = run.read_json(run_dir / "manifest.json"), run.read_json(run_dir / "spec.json")
    data = read_manifest(boxes)
    check_fits(data, spec["model"], boxes)
    check_trained_on(data, run_dir, boxes)
    split = BoxSplit(boxes, settings["split"])
    torch.set_num_threads(spec["training"]["threads"])
    model = analysis.read_run(run_dir, record, out)
    found = detect(model, split, settings["batch_size"], settings["limit"])
    for what, numbers in (("scores", found.scores), ("boxes", found.boxes)):
        analysis.check_finite(numbers, f"{run_dir / 'model'}: {what}")
    chosen = range(min(-(-settings["examples"] // 2), len(found.boxes)))
    _draw([split.images[i] for i in chosen], out / "examples.png")
    metrics = {
        "run": record["run"],
        "dataset": data["dataset"],
        "parameters": record["parameters"],
        "training": record["training"],
        "detection": found.scores_of(len(data["classes"])),
        "classes": data["classes"],
        "examples": [_describe(found, i, settings["boxes"]) for i in chosen],
        "settings": settings,
        "data": {k: v for k, v in data["splits"][settings["split"]].items() if k.endswith("sha256")},
        "provenance": run.provenance({"run": record["identity"]}, detector.PACKAGES),
    }
    run.write_json(out / "metrics.json", metrics)
    return metrics


def _describe(found: Detections, index: int, count: int) -> dict[str, Any]:
    truth, size = found.split.boxes(index), np.tile(found.split.size(index), 2)
    surest = found.scores[index].argsort(descending=True, stable=True)[:count]
    return {
        "tile": index,
        "image": int(found.split.records[index]["id"]),
        "size": [int(n) for n in size[:2]],
        "truth": [
            {"label": int(one["label"]), "crowd": bool(one["crowd"]), "box": (one["xywh"] / size).round(6).tolist()}
            for one in truth
        ],
        "found": [
            {
                "label": int(found.labels[index, i]),
                "score": round(float(found.scores[index, i]), 6),
                "box": (found.boxes[index, i].numpy() / size).round(6).tolist(),
            }
            for i in surest
        ],
    }


def _draw(tiles: list[np.ndarray], path: Path) -> None:
    """One row of images in the size that the model sees."""
    from PIL import Image

    if not tiles:
        path.unlink(missing_ok=True)
        return
    with whole_file(path) as temporary:
        Image.fromarray(np.concatenate(tiles, axis=1)).save(temporary, "PNG")
