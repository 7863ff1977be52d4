"""Evaluate a Vision Transformer's run: accuracies, confusions and example predictions of the folded model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masa.data.pixels import ImageSplit, check_fits, check_trained_on, read_manifest
from masa.errors import unknown
from masa.evaluation import analysis
from masa.evaluation.classification import Predictions, predict
from masa.models import timm_vit
from masa.runs import run
from masa.runs.files import whole_file
from masa.sharing.fold import fold

SETTINGS: dict[str, Any] = {"split": "test", "limit": None, "batch_size": 256, "examples": 16}
"""Defaults: which split is scored, how many of its images (None: all), and how many examples are drawn."""


def evaluate(run_dir: Path, images: Path, settings: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Write ``metrics.json``, ``weights.json`` and ``examples.png`` into ``out``.

    ``metrics.json`` holds parameters, training and ``classification`` (:meth:`.classification.Predictions.scores`),
    the names of the classes and ``examples``, whose images stand side by side in ``examples.png``: half are the first
    of the split, half the mistakes that the model was surest of. A report draws all of it without loading a model.

    Args:
        run_dir: a finished run (:func:`masa.training.images.pretrain`).
        images: what it was trained on.
        settings: any of :data:`SETTINGS`.

    Raises:
        MasaError: an incomplete run, images that do not fit it, or an unknown setting or split.
    """
    for key in settings:
        if key not in SETTINGS:
            raise unknown("Image evaluation: setting", key, SETTINGS)
    settings = SETTINGS | dict(settings)
    record, spec = run.read_json(run_dir / "manifest.json"), run.read_json(run_dir / "spec.json")
    data = read_manifest(images)
    check_fits(data, spec["model"], images)
    check_trained_on(data, run_dir, images)
    split = ImageSplit(images, settings["split"])
    torch.set_num_threads(spec["training"]["threads"])
    model = fold(analysis.read_run(run_dir, record, out))  # three products for one fused q, k, v take a tenth longer
    found = predict(model, split, settings["batch_size"], settings["limit"])
    analysis.check_finite(found.logits, f"{run_dir / 'model'}: logits")
    chosen = _examples(found, settings["examples"])
    _draw([split.images[i] for i in chosen], out / "examples.png")
    metrics = {
        "run": record["run"],
        "dataset": data["dataset"],
        "parameters": record["parameters"],
        "training": record["training"],
        "classification": found.scores(),
        "classes": data["classes"],
        "titles": data["titles"],
        "examples": [_describe(found, i, tile) for tile, i in enumerate(chosen)],
        "settings": settings,
        "data": {k: v for k, v in data["splits"][settings["split"]].items() if k.endswith("sha256")},
        "provenance": run.provenance({"run": record["identity"]}, timm_vit.PACKAGES),
    }
    run.write_json(out / "metrics.json", metrics)
    return metrics


def _examples(found: Predictions, count: int) -> list[int]:
    """The first images, then the surest mistakes; each once."""
    count = min(count, len(found.labels))
    first = list(range(count - count // 2))
    surety, guess = found.logits.softmax(1).max(1)
    wrong = torch.nonzero(guess != found.labels).flatten()
    order: Tensor = wrong[surety[wrong].argsort(descending=True, stable=True)]
    return first + [int(i) for i in order if int(i) not in set(first)][: count // 2]


def _describe(found: Predictions, index: int, tile: int) -> dict[str, Any]:
    probabilities = found.logits[index].softmax(0)
    best = probabilities.topk(min(5, len(probabilities)))
    return {
        "tile": tile,
        "index": index,
        "label": int(found.labels[index]),
        "prediction": int(best.indices[0]),
        "top": [[int(c), round(float(p), 6)] for p, c in zip(best.values, best.indices, strict=True)],
    }


def _draw(tiles: list[np.ndarray], path: Path) -> None:
    """One row of images in their own size."""
    from PIL import Image

    row = np.concatenate(tiles, axis=1)
    with whole_file(path) as temporary:
        Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row).save(temporary, "PNG")
