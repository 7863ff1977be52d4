"""What images with boxes to prepare, as plain data: checked before anything is loaded, without numpy or torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from masa.data import sources
from masa.data.image_sets import spec_of
from masa.errors import MasaError, unknown
from masa.settings import Positive, Section, Source, Split, key

SHAPES = ("rectangle", "ellipse", "triangle")
"""Classes of the generated data set."""


class Boxes(Section):
    """Images with boxes, for detectors."""

    dataset: str = key("shapes (drawn), coco, or custom (any data set in COCO's layout).")
    image_size: int = key("Images are resized to a square of this size.", ge=8)
    source: Source | None = key(
        "file:/mirror: with a folder in COCO's layout (annotations, train2017, val2017), or hub:ORG/NAME@COMMIT.", None
    )
    validation_fraction: Split = key(
        "Fraction of the training images held out; the data set's own validation images are the test (coco: 0.02).", 0.1
    )
    empty_boxes: Literal["error", "drop"] = key(
        "What happens with boxes without a pixel: the first is named, or they are left out and counted (coco: drop).",
        "error",
    )
    outside_boxes: Literal["error", "clip", "drop"] = key(
        "What happens with boxes that stick out of their image by more than a pixel: the first is named, they are cut "
        "off at the edge, or they are left out; both are counted.",
        "error",
    )
    count: int = key("shapes: training and validation images.", 640, ge=2)
    test_count: Positive = key("shapes: test images.", 128)
    max_boxes: Positive = key("shapes: boxes of an image at most.", 3)
    seed: int = key("shapes: of the drawing.", 0, ge=0)


@dataclass(frozen=True)
class BoxDataset:
    """One data set.

    Attributes:
        keys: of :class:`Boxes`, that only some data sets have.
        num_classes: how many there must be, or None where the annotations say.
        generated: whether it is drawn by :mod:`masa.data.shapes`; any other is read from ``source``.
        defaults: where they are not those of :class:`Boxes`.
    """

    keys: tuple[str, ...] = ("source", "empty_boxes", "outside_boxes")
    num_classes: int | None = None
    generated: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


DATASETS = {
    "shapes": BoxDataset(("count", "test_count", "max_boxes", "seed"), len(SHAPES), generated=True),
    # YOLOS' own code leaves empty boxes out, too
    "coco": BoxDataset(num_classes=80, defaults={"empty_boxes": "drop", "validation_fraction": 0.02}),
    "custom": BoxDataset(),
}
"""``custom`` is any data set in COCO's layout."""


def resolve(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a data set with every default filled in.

    Args:
        spec: ``name`` (a key of :data:`DATASETS`), and the keys of :class:`Boxes` that such a data set has.

    Raises:
        MasaError: an unknown data set or key, a missing one, or a value out of its range.
    """
    name = spec.get("name") or ""
    if name not in DATASETS:
        raise unknown("Data set of boxes", name, DATASETS)
    entry, where = DATASETS[name], f"Boxes of {name!r}"
    known = ("image_size", "validation_fraction", *entry.keys)
    given = {k: v for k, v in spec.items() if k != "name" and (v is not None or k == "image_size")}
    for given_key in given:
        if given_key not in known:
            raise unknown(f"{where}: key", given_key, ("name", *known))
    full = Boxes.filled({"dataset": name, **entry.defaults, **given}, f"{where}: ", where)
    full = {"name": name} | {k: full[k] for k in known} | {"validation_fraction": float(full["validation_fraction"])}
    if entry.generated:
        return full
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
    full = resolve(spec_of(entry))
    known = {"image_size": full["image_size"], "num_classes": DATASETS[full["name"]].num_classes}
    for size, value in known.items():
        if value is not None and model.get(size, value) != value:
            raise MasaError(
                f"model.{size} = {model[size]}, but boxes of {full['name']} have {value}. Set it to {value}."
            )
