"""Read images with boxes: COCO's own layout, or parquet files like the hub's ``detection-datasets/coco``.

The layout is ``annotations/instances_train2017.json``, ``annotations/instances_val2017.json`` and the image folders
``train2017/`` and ``val2017/``. Annotations are parsed piece by piece: of 450 MB of outlines only the boxes stay.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from masa.data import images, sources
from masa.data.json_stream import members
from masa.errors import MasaError, unknown
from masa.runs import files

BOX = np.dtype([("label", "<i4"), ("crowd", "u1"), ("xywh", "<f8", 4), ("area", "<f8")])
"""A box: class number, whether it is a crowd, (x, y, width, height) and the object's area in the image's own pixels."""

SPLITS = {"train": "train2017", "test": "val2017"}
"""Our split -> COCO's. The labels of its test images are not public; val2017 is scored, as everywhere."""

SLACK = 1.0
"""Pixels by which a box may stick out of its image, as rounded ones do; what sticks out is no training target."""


@dataclass(frozen=True)
class Scene:
    """An image with its boxes.

    Attributes:
        name: where it comes from, for messages.
        id: its number in the data set.
        pixels: (H, W, 3) uint8.
        boxes: (n,) of :data:`BOX`.
    """

    name: str
    id: int
    pixels: np.ndarray
    boxes: np.ndarray


@dataclass
class Raw:
    """What a reader found.

    Attributes:
        classes: names in the order of the labels.
        splits: "train" and "test" -> scenes, read one at a time.
        sizes: number of scenes of each.
        files: annotation or parquet file -> sha256.
        dropped: number of boxes without a pixel that were left out; grows while scenes are read.
    """

    classes: list[str]
    splits: Mapping[str, Iterable[Scene]]
    sizes: Mapping[str, int]
    files: Mapping[str, str]
    dropped: int = 0


def read(source: sources.Source, mirror: str | None, empty: str) -> Raw:
    """Open a data set; its annotations are checked at once, its images when they are read.

    Args:
        empty: "error" or "drop", see :data:`masa.data.box_spec.EMPTY`.

    Raises:
        MasaError: a source that cannot be had, a file that is missing or corrupt, or an annotation that cannot be;
            file and annotation are named.
    """
    if source.scheme == "hub":
        root = sources.snapshot(source, mirror, ["annotations/*", "*2017/*", "*.parquet", "**/*.parquet"], "dataset")
    elif source.scheme == "mirror":
        root = sources.mirror_root(mirror, str(source)) / source.name
    else:
        root = Path(source.name)
    if not root.is_dir():
        raise MasaError(f"{source}: {root} is not a folder.")
    if (root / "annotations").is_dir():
        return read_layout(root, empty)
    return read_parquet(root, empty)


# ---------------------------------------------------------------------------------------------------- COCO's layout


@dataclass(frozen=True)
class Annotations:
    """One annotation file: images in their order, and their boxes in the same order.

    Attributes:
        images: id -> (file name, width, height).
        classes: id -> name, sorted by id.
        boxes: (n,) of :data:`BOX`; those of image i are ``boxes[first[i]:first[i + 1]]``.
        dropped: number of boxes without a pixel that were left out.
    """

    images: dict[int, tuple[str, int, int]]
    classes: dict[int, str]
    boxes: np.ndarray
    first: np.ndarray
    dropped: int


def read_layout(root: Path, empty: str) -> Raw:
    """A folder in COCO's layout."""
    paths = {split: root / "annotations" / f"instances_{name}.json" for split, name in SPLITS.items()}
    found = {split: read_annotations(path, empty) for split, path in paths.items()}
    if found["train"].classes != found["test"].classes:
        raise MasaError(f"{paths['train']} and {paths['test']} have different categories; labels would not agree.")
    return Raw(
        list(found["train"].classes.values()),
        {split: _scenes(root / SPLITS[split], paths[split], found[split]) for split in found},
        {split: len(annotations.images) for split, annotations in found.items()},
        {str(path.relative_to(root)): files.sha256_of(path) for path in paths.values()},
        sum(annotations.dropped for annotations in found.values()),
    )


def _scenes(folder: Path, path: Path, found: Annotations) -> Iterator[Scene]:
    for i, (number, (file, width, height)) in enumerate(found.images.items()):
        name = f"{path}: image {number} ({folder / file})"
        try:
            data = (folder / file).read_bytes()
        except OSError as error:
            raise MasaError(
                f"{name} cannot be read ({error.strerror}). Unpack the images beside annotations/."
            ) from error
        pixels = images.decode(data, 3, name)
        if pixels.shape[:2] != (height, width):
            raise MasaError(
                f"{name}: the image is {pixels.shape[1]} x {pixels.shape[0]}, the annotations say {width} x {height} "
                "(width x height)."
            )
        yield Scene(name, number, pixels, found.boxes[found.first[i] : found.first[i + 1]])


def read_annotations(path: Path, empty: str) -> Annotations:
    """Read and check one annotation file; memory holds about 100 bytes a box and 300 an image.

    Raises:
        MasaError: see :func:`read`.
    """
    files: dict[int, tuple[str, int, int]] = {}
    classes: dict[int, str] = {}
    table = array("d")
    for key, item in members(path, ("images", "annotations", "categories")):
        try:
            number = _integer(item["id"])
            if key == "images":
                if number in files:
                    raise MasaError(f"{path}: two images have the id {number}.")
                file = PurePosixPath(str(item["file_name"]))
                if file.is_absolute() or ".." in file.parts or "\0" in str(file):
                    raise MasaError(f"{path}: image {number}: {str(file)!r} is not a file in the folder of images.")
                files[number] = str(file), _integer(item["width"]), _integer(item["height"])
            elif key == "categories":
                if number in classes:
                    raise MasaError(f"{path}: two categories have the id {number}.")
                classes[number] = str(item["name"])
            else:
                x, y, width, height = map(float, item["bbox"])
                area = float(item.get("area") or width * height)
                crowd = _integer(item.get("iscrowd", 0))
                table.extend((number, _integer(item["image_id"]), _integer(item["category_id"]), crowd))
                table.extend((x, y, width, height, area))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise MasaError(f"{path}: an entry of {key} {reason}: {str(item)[:200]}") from error
    if not files or not classes:
        raise MasaError(f"{path} lists no {'categories' if files else 'images'}; see the README of COCO's layout.")
    return _checked(path, files, dict(sorted(classes.items())), np.array(table).reshape(-1, 9), empty)


def _checked(
    path: Path, files: dict[int, tuple[str, int, int]], classes: dict[int, str], rows: np.ndarray, empty: str
) -> Annotations:
    """Boxes in the order of the images; ``rows`` (n, 9) holds id, image, category, crowd, x, y, w, h and area."""
    ids, of_image, of_class = (rows[:, i].astype(np.int64) for i in range(3))
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise MasaError(f"{path}: two annotations have the id {values[counts.argmax()]}.")
    position = _positions(path, ids, of_image, list(files), "image", "images")
    label = _positions(path, ids, of_class, list(classes), "category", "categories")
    sizes = np.array([size for _, *size in files.values()], np.float64)[position]
    kept = check_boxes(str(path), ids, rows[:, 4:8], sizes, empty)
    order = np.flatnonzero(kept)[np.argsort(position[kept], kind="stable")]
    first = np.searchsorted(position[order], np.arange(len(files) + 1))
    return Annotations(
        files, classes, make_boxes(label, rows[:, 3], rows[:, 4:8], rows[:, 8])[order], first, int((~kept).sum())
    )


def _positions(path: Path, ids: np.ndarray, wanted: np.ndarray, known: list[int], what: str, where: str) -> np.ndarray:
    """Where in ``known`` every wanted id is."""
    order = np.argsort(known)
    place = np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)
    position = order[place]
    wrong = np.array(known)[position] != wanted
    if wrong.any():
        i = int(wrong.argmax())
        raise MasaError(f"{path}: annotation {ids[i]} is of {what} {wanted[i]}, which is not among the {where}.")
    return position


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not an integer")
    return value


def make_boxes(labels: Any, crowds: Any, xywh: np.ndarray, areas: Any) -> np.ndarray:
    """(n,) of :data:`BOX`."""
    boxes = np.zeros(len(xywh), BOX)
    boxes["label"], boxes["crowd"], boxes["xywh"], boxes["area"] = labels, np.asarray(crowds) != 0, xywh, areas
    return boxes


def check_boxes(where: str, ids: np.ndarray, xywh: np.ndarray, sizes: np.ndarray, empty: str) -> np.ndarray:
    """Which boxes have a pixel to keep.

    Args:
        where: file or row, for messages.
        ids: (n,) numbers of the annotations.
        xywh: (n, 4) boxes, in pixels.
        sizes: (n, 2) width and height of their images.
        empty: "error" or "drop".

    Raises:
        MasaError: a box that is not finite, negative or outside its image, or empty where that is an error.
    """
    start, end = xywh[:, :2], xywh[:, :2] + xywh[:, 2:]
    without = (end.clip(max=sizes) - start.clip(min=0) <= 0).any(1)
    for bad, reason in (
        (~np.isfinite(xywh).all(1), "is not finite"),
        ((xywh[:, 2:] < 0).any(1), "has a negative width or height"),
        ((start < -SLACK).any(1) | (end > sizes + SLACK).any(1), "lies outside its image"),
        (without & (empty == "error"), "is empty (empty_boxes: drop leaves such boxes out)"),
    ):
        if bad.any():
            i = int(bad.argmax())
            size = " x ".join(f"{n:g}" for n in sizes[i])
            raise MasaError(
                f"{where}: annotation {ids[i]}: the box {xywh[i].tolist()} (x, y, width, height) in an image of {size} "
                f"pixels {reason}."
            )
    return ~without


# -------------------------------------------------------------------------------------------------------- parquet

COLUMNS = ("image_id", "image", "width", "height", "objects")
_VAL = {"train": "train", "test": "val"}


def read_parquet(root: Path, empty: str) -> Raw:
    """Parquet files of the hub's ``detection-datasets/coco``: encoded images and ``objects`` with bbox, category, area.

    Its boxes are corners (x1, y1, x2, y2), not COCO's (x, y, width, height): image 9 begins with 1.08, 187.69, 612.67,
    473.53. A copy with the latter stops at the first box that is further to the right than wide, and so negative as
    corners. It has no crowd flag: its scores are no official ones.
    """
    found = {split: images.parquet_files(root, name) for split, name in _VAL.items()}
    for split, paths in found.items():
        if not paths:
            raise MasaError(
                f"{root} holds neither annotations/ (COCO's layout) nor a file {_VAL[split]}*.parquet. Give the folder "
                "that does."
            )
    classes = images.same_classes({path: _classes(path) for paths in found.values() for path in paths})
    raw = Raw(
        classes,
        {},
        {split: sum(map(images.count_rows, paths)) for split, paths in found.items()},
        {str(p.relative_to(root)): files.sha256_of(p) for paths in found.values() for p in paths},
    )
    raw.splits = {split: _rows(paths, len(classes), empty, raw) for split, paths in found.items()}
    return raw


def _classes(path: Path) -> list[str]:
    """Class names, out of the schema that ``datasets`` stores."""
    from datasets import Features

    with images.open_parquet(path) as file:
        schema = file.schema_arrow
    for column in COLUMNS:
        if column not in schema.names:
            raise unknown(f"{path}: column", column, schema.names)
    objects = Features.from_arrow_schema(schema)["objects"]
    fields = getattr(objects, "feature", objects)
    fields = fields[0] if isinstance(fields, list) else fields
    category = fields.get("category") if isinstance(fields, Mapping) else None
    names = getattr(getattr(category, "feature", category), "names", None)
    if not names:
        raise MasaError(f"{path}: the schema does not name the classes of objects.category (a ClassLabel feature).")
    return list(names)


def _rows(paths: list[Path], classes: int, empty: str, raw: Raw) -> Iterator[Scene]:
    import pyarrow

    seen: set[int] = set()
    for path in paths:
        row = 0
        try:
            with images.open_parquet(path) as file:
                for batch in file.iter_batches(batch_size=64, columns=list(COLUMNS)):
                    for record in batch.to_pylist():
                        row += 1
                        number = record["image_id"]
                        name = f"{path}, row {row} (image {number})"
                        if number in seen:
                            raise MasaError(f"{name}: two images have this id.")
                        seen.add(number)
                        yield _scene(name, record, classes, empty, raw)
        except (pyarrow.ArrowException, OSError) as error:
            raise MasaError(f"{path} is corrupt after row {row} ({error}); fetch it again.") from error


def _scene(name: str, record: Mapping[str, Any], classes: int, empty: str, raw: Raw) -> Scene:
    if not record["image"] or not record["image"].get("bytes"):
        raise MasaError(f"{name}: no image.")
    pixels = images.decode(record["image"]["bytes"], 3, name)
    size = record["width"], record["height"]
    if pixels.shape[1::-1] != size:
        raise MasaError(f"{name}: the image is {pixels.shape[1::-1]}, its columns say {size} (width, height).")
    objects = record["objects"]
    if isinstance(objects, list):  # a list of structs rather than a struct of lists
        objects = {key: [one.get(key) for one in objects] for key in ("bbox_id", "category", "bbox", "area")}
    labels = np.array(objects["category"], np.int64)
    ids = np.array(objects.get("bbox_id") or range(len(labels)), np.int64)
    corners = np.array(objects["bbox"], np.float64).reshape(-1, 4)
    if len(corners) != len(labels):
        raise MasaError(f"{name}: {len(corners)} boxes, but {len(labels)} categories.")
    if (wrong := (labels < 0) | (labels >= classes)).any():
        i = int(wrong.argmax())
        raise MasaError(f"{name}: annotation {ids[i]} is of category {labels[i]}, which is not in 0..{classes - 1}.")
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    kept = check_boxes(name, ids, xywh, np.tile(np.array(size, np.float64), (len(xywh), 1)), empty)
    raw.dropped += int((~kept).sum())
    areas = objects.get("area") or xywh[:, 2] * xywh[:, 3]
    return Scene(name, record["image_id"], pixels, make_boxes(labels, np.zeros(len(labels)), xywh, areas)[kept])
