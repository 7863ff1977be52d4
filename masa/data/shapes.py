"""Draw a data set of boxes: bright rectangles, ellipses and triangles on dark noise, written in COCO's own layout.

It exists to try the detector where COCO is not at hand. Images differ in size; later shapes may hide parts of earlier
ones, and boxes are those of the whole shapes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from masa.data.box_spec import SHAPES
from masa.data.coco import SPLITS

IDS = (2, 5, 9)
"""Category ids, with gaps as COCO's."""

OVERLAP = 0.3
"""Two boxes whose intersection over union exceeds this are not drawn in one image."""


def write(folder: Path, count: int, test_count: int, image_size: int, max_boxes: int, seed: int) -> None:
    """Draw the images; image i of a split depends on ``seed``, split and i alone.

    Args:
        folder: gets ``annotations/``, ``train2017/`` and ``val2017/``.
        count, test_count: images of train2017 and val2017.
        image_size: their width and height lie between 3/4 and 5/4 of it.
        max_boxes: an image has 1 to this many shapes, fewer where they find no place.
    """
    from PIL import Image

    (folder / "annotations").mkdir(parents=True)
    for part, (name, images) in enumerate(zip(SPLITS.values(), (count, test_count), strict=True)):
        (folder / name).mkdir()
        annotations: dict[str, list[dict[str, Any]]] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": i, "name": shape} for i, shape in zip(IDS, SHAPES, strict=True)],
        }
        for i in range(images):
            number = part * 1_000_000 + i + 1
            pixels, objects = draw(np.random.default_rng([seed, part, i]), image_size, max_boxes)
            file = f"{number:012d}.png"
            Image.fromarray(pixels).save(folder / name / file)
            height, width = pixels.shape[:2]
            annotations["images"].append({"id": number, "file_name": file, "width": width, "height": height})
            for label, box, area in objects:
                annotations["annotations"].append(
                    {
                        "id": len(annotations["annotations"]) + 1,
                        "image_id": number,
                        "category_id": IDS[label],
                        "bbox": box,
                        "area": area,
                        "iscrowd": 0,
                    }
                )
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(annotations), encoding="utf-8")


def draw(
    generator: np.random.Generator, image_size: int, max_boxes: int
) -> tuple[np.ndarray, list[tuple[int, list[float], float]]]:
    """One image (H, W, 3) uint8, and label, (x, y, width, height) and area in pixels of each shape."""
    height, width = generator.integers(image_size * 3 // 4, image_size * 5 // 4 + 1, 2)
    background = generator.integers(0, 96, 3)
    noise = generator.normal(0, 12, (height, width, 3))
    pixels = np.clip(background + noise, 0, 255).astype(np.uint8)
    objects: list[tuple[int, list[float], float]] = []
    for _ in range(generator.integers(1, max_boxes + 1)):
        label = int(generator.integers(len(SHAPES)))
        for _ in range(20):
            w, h = (int(generator.integers(max(3, side // 4), max(4, side * 5 // 8))) for side in (width, height))
            x, y = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            mask = _mask(label, w, h)
            box = _tight(mask, x, y)
            if all(_iou(box, other) <= OVERLAP for _, other, _ in objects):
                break
        else:
            continue
        pixels[y : y + h, x : x + w][mask] = generator.integers(128, 256, 3)
        objects.append((label, box, float(mask.sum())))
    return pixels, objects


def _mask(label: int, width: int, height: int) -> np.ndarray:
    """(height, width) pixels that the shape covers; the triangle's tip is in the middle of its top."""
    y, x = np.mgrid[:height, :width] + 0.5
    across, down = np.abs(2 * x / width - 1), y / height  # 0 in the middle and 1 at the sides; 0 at the top
    return (np.ones_like(x, bool), across**2 + (2 * down - 1) ** 2 <= 1, across <= down)[label]


def _tight(mask: np.ndarray, x: int, y: int) -> list[float]:
    """(x, y, width, height) of the covered pixels of a mask whose corner is at (x, y)."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return [
        float(x + columns[0]),
        float(y + rows[0]),
        float(columns[-1] - columns[0] + 1),
        float(rows[-1] - rows[0] + 1),
    ]


def _iou(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes (x, y, width, height)."""
    sides = [max(0.0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    both = sides[0] * sides[1]
    return both / (a[2] * a[3] + b[2] * b[3] - both)
