"""What a reader must know of a table of Vision Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masa.report import metrics as m


def note(spec: Mapping[str, Any], results: Path) -> str:
    """Data, sizes and lengths of training of every scale, and what the cells mean.

    Args:
        spec: from :func:`masa.config.artefact_spec`.
        results: directory with ``evaluations/``.
    """
    first = {row["scale"]: (row, m.load(results, row["records"][0])) for row in reversed(spec["rows"])}
    parts = [
        "Cells: mean ± sample standard deviation over seeds; with one seed top-1 ± its standard error over images. "
        "In brackets the paper's (CIFAR-100 alone) and our difference. Attention reduction: 1 - stored / dense of "
        "Q, K, V and O; S = L/3 saves 66.7 %, S = 4 of 24 layers 83.3 %, coefficients counted. All methods of one "
        "scale see the same images in the same order with the same augmentation; the learning rate is vanilla's best."
    ]
    for scale in dict.fromkeys(row["scale"] for row in spec["rows"]):
        row, record = first[scale]
        scores, training = record["classification"], record["training"]
        classes = len(record["classes"])
        parts.append(
            f"{scale}: {record['dataset']}, {classes} classes (chance {100 / classes:.3g} %), "
            f"{scores['images']:,} {record['settings']['split']} images, {training['steps']:,} steps of "
            f"{training['images'] // training['steps']} images, {_seeds(row)}."
        )
    return " ".join(parts)


def _seeds(row: Mapping[str, Any]) -> str:
    count = len(row["records"])
    return f"{count} seeds" if count > 1 else "one seed"
