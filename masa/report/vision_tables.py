"""What a reader must know of a table of Vision Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masa.evaluation import metrics as m

OF_KIND = {
    "classification": "with one seed top-1 ± its standard error over images. In brackets the paper's value (CIFAR-100 "
    "alone) and our difference. S = L/3 saves 66.7 % of the attention matrices and S = 4 of 24 layers 83.3 %, less the "
    "coefficients, which count (0.1 points at d = 64). The learning rate is vanilla's best",
    "detection": "mAP is COCO's, over IoU 0.5 to 0.95, in pixels of the original images. The recipe is tuned for no "
    "method; the paper gives no numbers",
}
"""Part of a metrics file -> what a reader of its table must know."""


def is_vision(record: Mapping[str, Any]) -> bool:
    """Whether a metrics file is of a Vision Transformer or a detector."""
    return _part(record) is not None


def _part(record: Mapping[str, Any]) -> str | None:
    return next((part for part in OF_KIND if part in record), None)


def note(spec: Mapping[str, Any], results: Path) -> str:
    """Data, sizes and lengths of training of every scale, and what the cells mean.

    Args:
        spec: from :func:`masa.study.artefacts.artefact_spec`.
        results: directory with ``evaluations/``.
    """
    first = {row["scale"]: (row, m.load(results, row["records"][0])) for row in reversed(spec["rows"])}
    kind = OF_KIND[_part(first[spec["rows"][0]["scale"]][1]) or ""]
    parts = [
        f"Cells: mean ± sample standard deviation over seeds; {kind}. Attention reduction: 1 - stored / dense of Q, K, "
        "V and O. All methods of one scale see the same images in the same order with the same augmentation."
    ]
    for scale in dict.fromkeys(row["scale"] for row in spec["rows"]):
        row, record = first[scale]
        scores, training = record[_part(record)], record["training"]
        classes = len(record["classes"])
        chance = f" (chance {100 / classes:.3g} %)" if "classification" in record else ""
        parts.append(
            f"{scale}: {record['dataset']}, {classes} classes{chance}, "
            f"{scores['images']:,} {record['settings']['split']} images, {training['steps']:,} steps of "
            f"{training['images'] // training['steps']} images, {_seeds(row)}."
        )
    return " ".join(parts)


def _seeds(row: Mapping[str, Any]) -> str:
    count = len(row["records"])
    return f"{count} seeds" if count > 1 else "one seed"
