"""What is stored of an image with boxes, and what happens with boxes that a detector cannot learn."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from masa.errors import MasaError

IMAGE = np.dtype([("id", "<i8"), ("width", "<i4"), ("height", "<i4"), ("boxes", "<i4")])
"""An image: its number in the data set, its original size, and how many boxes it has."""

BOX = np.dtype([("label", "<i4"), ("crowd", "u1"), ("xywh", "<f8", 4), ("area", "<f8")])
"""A box: class number, whether it is a crowd, (x, y, width, height) and the object's area in the image's own pixels."""

SLACK = 1.0
"""Pixels by which a box may stick out of its image, as rounded ones do; what sticks out is no training target."""


@dataclass(frozen=True)
class Rules:
    """What happens with boxes that a detector cannot learn; see :class:`masa.data.box_spec.Boxes`.

    Attributes:
        empty: "error" or "drop".
        outside: "error", "clip" or "drop".
    """

    empty: str = "error"
    outside: str = "error"

    @classmethod
    def coerce(cls, rules: Rules | str) -> Rules:
        """Accept what happens with empty boxes alone."""
        return rules if isinstance(rules, cls) else cls(str(rules))


def make_boxes(labels: Any, crowds: Any, xywh: np.ndarray, areas: Any) -> np.ndarray:
    """(n,) of :data:`BOX`."""
    boxes = np.zeros(len(xywh), BOX)
    boxes["label"], boxes["crowd"], boxes["xywh"], boxes["area"] = labels, np.asarray(crowds) != 0, xywh, areas
    return boxes


def fit_boxes(
    where: str, ids: np.ndarray, boxes: np.ndarray, sizes: np.ndarray, rules: Rules
) -> tuple[np.ndarray, np.ndarray, Counter[str]]:
    """Boxes as the rules want them, which of them are kept, and how many were changed or left out.

    A box that sticks out of its image by at most :data:`SLACK` is left as it is, as rounded ones do. A clipped one ends
    at the edge, and its area is no more than what is left of it.

    Args:
        where: file or row, for messages.
        ids: (n,) numbers of the annotations.
        boxes: (n,) of :data:`BOX`.
        sizes: (n, 2) width and height of their images.

    Raises:
        MasaError: a box that is not finite, or negative, or outside its image or empty where that is an error.
    """
    xywh = boxes["xywh"]
    start, end = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    outside = (start < -SLACK).any(1) | (end > sizes + SLACK).any(1)
    empty = (end.clip(max=sizes) - start.clip(min=0) <= 0).any(1)
    for bad, reason in (
        (~np.isfinite(xywh).all(1), "is not finite"),
        ((xywh[:, 2:] < 0).any(1), "has a negative width or height"),
        (
            outside & (rules.outside == "error"),
            "lies outside its image (outside_boxes: clip cuts such boxes off at the edge, drop leaves them out)",
        ),
        (
            empty & ~(outside & (rules.outside == "drop")) & (rules.empty == "error"),
            "is empty (empty_boxes: drop leaves such boxes out)",
        ),
    ):
        if bad.any():
            i = int(bad.argmax())
            size = " x ".join(f"{n:g}" for n in sizes[i])
            raise MasaError(
                f"{where}: annotation {ids[i]}: the box {xywh[i].tolist()} (x, y, width, height) in an image of {size} "
                f"pixels {reason}."
            )
    clipped = outside & ~empty & (rules.outside == "clip")
    if clipped.any():
        boxes, low = boxes.copy(), start.clip(min=0)[clipped]
        sides = end.clip(max=sizes)[clipped] - low
        boxes["xywh"][clipped] = np.concatenate([low, sides], 1)
        boxes["area"][clipped] = np.minimum(boxes["area"][clipped], sides.prod(1))
    dropped = outside & (rules.outside == "drop")
    counts = {"empty": empty & ~dropped, "clipped": clipped, "outside": dropped}
    return boxes, ~(empty | dropped), Counter({name: int(which.sum()) for name, which in counts.items()})
