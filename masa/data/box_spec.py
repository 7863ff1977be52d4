"""What images with boxes to prepare, as plain data: checked before anything is loaded, without numpy or torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from masa.data import sources
from masa.errors import MasaError, unknown

SHAPES = ("rectangle", "ellipse", "triangle")
"""Classes of the generated data set."""

EMPTY = ("error", "drop")
"""What happens with boxes without a pixel: an error that names the first, or they are left out and counted."""


@dataclass(frozen=True)
class BoxDataset:
    """One data set.

    Attributes:
        keys: keys of its own and their defaults.
        num_classes: how many there must be, or None where the annotations say.
        generated: whether it is drawn by :mod:`masa.data.shapes`; any other is read from ``source``.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    generated: bool = False


DATASETS = {
    "shapes": BoxDataset({"count": 640, "test_count": 128, "max_boxes": 3, "seed": 0}, len(SHAPES), generated=True),
    # YOLOS' own code leaves empty boxes out, too
    "coco": BoxDataset({"source": None, "empty_boxes": "drop"}, 80),
    "custom": BoxDataset({"source": None, "empty_boxes": "error"}),
}
"""``custom`` is any data set in COCO's layout."""

COMMON = {"image_size": None, "validation_fraction": None}
SHARES = {"coco": 0.02}
"""``validation_fraction`` where it is not 0.1."""


def resolve(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a data set with every default filled in.

    Args:
        spec: ``name`` (a key of :data:`DATASETS`), ``image_size`` (images are resized to its square) and optionally
            ``validation_fraction``; of ``shapes`` also ``count`` (training and validation images), ``test_count``,
            ``max_boxes`` (of an image) and ``seed``; of the others ``source`` (file:FOLDER, mirror:FOLDER or
            hub:ORG/NAME@COMMIT) and ``empty_boxes`` (:data:`EMPTY`).

    Raises:
        MasaError: an unknown data set or key, a missing one, or a value out of its range.
    """
    name = spec.get("name") or ""
    if name not in DATASETS:
        raise unknown("Data set of boxes", name, DATASETS)
    entry = DATASETS[name]
    known = COMMON | dict(entry.keys)
    for key in spec:
        if key not in ("name", *known):
            raise unknown(f"Boxes of {name!r}: key", key, ("name", *known))
    full = {"name": name} | known | {key: value for key, value in spec.items() if value is not None}
    fraction = SHARES.get(name, 0.1) if full["validation_fraction"] is None else full["validation_fraction"]
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise MasaError(f"validation_fraction is a fraction between 0 and 1, got {fraction!r}: no split may be empty.")
    full["validation_fraction"] = float(fraction)
    for key, low in (("image_size", 8), ("count", 2), ("test_count", 1), ("max_boxes", 1), ("seed", 0)):
        if key not in full:
            continue
        if isinstance(full[key], bool) or not isinstance(full[key], int) or full[key] < low:
            raise MasaError(f"Boxes of {name!r}: {key} must be an integer of at least {low}, got {full[key]!r}.")
    if entry.generated:
        return full
    if full["empty_boxes"] not in EMPTY:
        raise unknown("empty_boxes: value", full["empty_boxes"], EMPTY)
    if not full["source"]:
        raise MasaError(
            f"Boxes of {name!r} need a source: file:FOLDER or mirror:FOLDER in COCO's layout (annotations/, "
            "train2017/, val2017/), or hub:detection-datasets/coco@COMMIT."
        )
    if sources.parse(full["source"]).scheme == "pypi":
        raise MasaError(f"{full['source']}: boxes come from file:, mirror: or hub: sources.")
    return full


def check(entry: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """See that a data set of the configuration fits a detector, before anything is fetched.

    Args:
        entry: of the section ``boxes``.
        model: sizes of a detector.

    Raises:
        MasaError: a data set that :func:`resolve` refuses, or images of another size or with other classes.
    """
    full = resolve({"name": entry["dataset"]} | {k: v for k, v in entry.items() if k != "dataset"})
    known = {"image_size": full["image_size"], "num_classes": DATASETS[full["name"]].num_classes}
    for key, value in known.items():
        if value is not None and model.get(key, value) != value:
            raise MasaError(f"model.{key} = {model[key]}, but boxes of {full['name']} have {value}. Set it to {value}.")
