"""Read images with boxes: COCO's own layout, or parquet files like the hub's ``detection-datasets/coco``.

The layout is ``annotations/instances_train2017.json``, ``annotations/instances_val2017.json`` and the image folders
``train2017/`` and ``val2017/``. Annotations are parsed piece by piece: of 450 MB of outlines only the boxes stay.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from masa.data import sources
from masa.data.box_records import BOX as BOX
from masa.data.box_records import Rules, fit_boxes, make_boxes
from masa.data.decoding import decode, orientation
from masa.data.json_stream import members
from masa.data.parquet_files import count_rows, open_parquet, parquet_files, same_classes
from masa.errors import MasaError, unknown
from masa.runs import files

SPLITS = {"train": "train2017", "test": "val2017"}
"""Our split -> COCO's. The labels of its test images are not public; val2017 is scored, as everywhere."""


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
        counts: boxes that were changed or left out, by what was wrong with them; grows while scenes are read.
    """

    classes: list[str]
    splits: Mapping[str, Iterable[Scene]]
    sizes: Mapping[str, int]
    files: Mapping[str, str]
    counts: Counter[str] = field(default_factory=Counter)


def read(source: sources.Source, mirror: str | None, rules: Rules | str) -> Raw:
    """Open a data set; its annotations are checked at once, its images when they are read.

    Raises:
        MasaError: a source that cannot be had, a file that is missing or corrupt, or an annotation that cannot be;
            file and annotation are named.
    """
    if source.scheme == "hub":
        root = sources.snapshot(source, mirror, ["annotations/*", "*2017/*", "*.parquet", "**/*.parquet"], "dataset")
    else:
        root = sources.local_folder(source, mirror)
    if (root / "annotations").is_dir():
        return read_layout(root, rules)
    return read_parquet(root, rules)


# ---------------------------------------------------------------------------------------------------- COCO's layout


@dataclass(frozen=True)
class Annotations:
    """One annotation file: images in their order, and their boxes in the same order.

    Attributes:
        images: id -> (file name, width, height).
        classes: id -> name, sorted by id.
        boxes: (n,) of :data:`BOX`; those of image i are ``boxes[first[i]:first[i + 1]]``.
        counts: as of :class:`Raw`.
    """

    images: dict[int, tuple[str, int, int]]
    classes: dict[int, str]
    boxes: np.ndarray
    first: np.ndarray
    counts: Counter[str]


def read_layout(root: Path, rules: Rules | str) -> Raw:
    """A folder in COCO's layout."""
    paths = {split: root / "annotations" / f"instances_{name}.json" for split, name in SPLITS.items()}
    found = {split: read_annotations(path, rules) for split, path in paths.items()}
    if found["train"].classes != found["test"].classes:
        raise MasaError(f"{paths['train']} and {paths['test']} have different categories; labels would not agree.")
    return Raw(
        list(found["train"].classes.values()),
        {split: _scenes(root / SPLITS[split], paths[split], found[split]) for split in found},
        {split: len(annotations.images) for split, annotations in found.items()},
        {str(path.relative_to(root)): files.sha256_of(path) for path in paths.values()},
        sum((annotations.counts for annotations in found.values()), Counter()),
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
        pixels = decode(data, 3, name)
        _check_size(name, data, pixels, (width, height), f"the annotations say {width} x {height} (width x height)")
        yield Scene(name, number, pixels, found.boxes[found.first[i] : found.first[i + 1]])


def _check_size(name: str, data: bytes, pixels: np.ndarray, size: tuple[int, int], said: str) -> None:
    """See that an upright image has the (width, height) that its boxes refer to.

    Args:
        said: who says so, for the message.

    Raises:
        MasaError: it has not; where EXIF turned it, the message says so.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return
    turned = orientation(data)
    why = f"the image is {width} x {height}, {said}."
    if turned > 4 and (height, width) == size:
        why += (
            f" It is stored so, and EXIF's orientation {turned} turns it: its boxes were drawn on the image as stored. "
            "Take the tag out of the file, e.g. `exiftool -Orientation= FILE`, or annotate it upright."
        )
    elif turned > 1:
        why += f" EXIF's orientation {turned} is applied: as stored it is {height} x {width}." if turned > 4 else ""
    raise MasaError(f"{name}: {why}")


def read_annotations(path: Path, rules: Rules | str) -> Annotations:
    """Read and check one annotation file; memory holds about 100 bytes a box and 300 an image.

    Raises:
        MasaError: see :func:`read`.
    """
    files: dict[int, tuple[str, int, int]] = {}
    classes: dict[int, str] = {}
    numbers, sizes = array("q"), array("d")  # ids are exact: a double has no integer between 2^53 and 2^53 + 2
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
                if "area" in item and not 0 <= float(item["area"] or 0) < float("inf"):
                    raise ValueError(f"area {item['area']!r} is no size in pixels")
                crowd = _integer(item.get("iscrowd", 0))
                numbers.extend((number, _integer(item["image_id"]), _integer(item["category_id"]), crowd))
                sizes.extend((x, y, width, height, area))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else f"cannot be read ({error})"
            raise MasaError(f"{path}: an entry of {key} {reason}: {str(item)[:200]}") from error
    for found, what in ((files, "images"), (classes, "categories"), (numbers, "annotations")):
        if not found:
            raise MasaError(f"{path} lists no {what}; see the README of COCO's layout.")
    tables = np.array(numbers, np.int64).reshape(-1, 4), np.array(sizes).reshape(-1, 5)
    return _checked(path, files, dict(sorted(classes.items())), *tables, Rules.coerce(rules))


def _checked(
    path: Path,
    files: dict[int, tuple[str, int, int]],
    classes: dict[int, str],
    numbers: np.ndarray,
    rows: np.ndarray,
    rules: Rules,
) -> Annotations:
    """Boxes in the order of the images, from (n, 4) id, image, category, crowd and (n, 5) x, y, w, h and area."""
    ids, of_image, of_class, crowd = numbers.T
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise MasaError(f"{path}: two annotations have the id {values[counts.argmax()]}.")
    position = _positions(path, ids, of_image, list(files), "image", "images")
    label = _positions(path, ids, of_class, list(classes), "category", "categories")
    sizes = np.array([size for _, *size in files.values()], np.float64)[position]
    boxes, kept, counts = fit_boxes(str(path), ids, make_boxes(label, crowd, rows[:, :4], rows[:, 4]), sizes, rules)
    order = np.flatnonzero(kept)[np.argsort(position[kept], kind="stable")]
    first = np.searchsorted(position[order], np.arange(len(files) + 1))
    return Annotations(files, classes, boxes[order], first, counts)


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
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{value} does not fit into 64 bits")
    return value


# -------------------------------------------------------------------------------------------------------- parquet

COLUMNS = ("image_id", "image", "width", "height", "objects")
_VAL = {"train": "train", "test": "val"}


def read_parquet(root: Path, rules: Rules | str) -> Raw:
    """Parquet files of the hub's ``detection-datasets/coco``: encoded images and ``objects`` with bbox, category, area.

    Its boxes are corners (x1, y1, x2, y2), not COCO's (x, y, width, height): image 9 begins with 1.08, 187.69, 612.67,
    473.53. A copy with the latter stops at the first box that is further to the right than wide, and so negative as
    corners. It has no crowd flag: its scores are no official ones.
    """
    found = {split: parquet_files(root, name) for split, name in _VAL.items()}
    for split, paths in found.items():
        if not paths:
            raise MasaError(
                f"{root} holds neither annotations/ (COCO's layout) nor a file {_VAL[split]}*.parquet. Give the folder "
                "that does."
            )
    classes = same_classes({path: _classes(path) for paths in found.values() for path in paths})
    raw = Raw(
        classes,
        {},
        {split: sum(map(count_rows, paths)) for split, paths in found.items()},
        {str(p.relative_to(root)): files.sha256_of(p) for paths in found.values() for p in paths},
    )
    rules = Rules.coerce(rules)
    raw.splits = {split: _rows(paths, len(classes), rules, raw) for split, paths in found.items()}
    return raw


def _classes(path: Path) -> list[str]:
    """Class names, out of the schema that ``datasets`` stores."""
    from datasets import Features

    with open_parquet(path) as file:
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


def _rows(paths: list[Path], classes: int, rules: Rules, raw: Raw) -> Iterator[Scene]:
    import pyarrow

    seen: set[int] = set()
    for path in paths:
        row = 0
        try:
            with open_parquet(path) as file:
                for batch in file.iter_batches(batch_size=64, columns=list(COLUMNS)):
                    for record in batch.to_pylist():
                        row += 1
                        number = record["image_id"]
                        name = f"{path}, row {row} (image {number})"
                        if not isinstance(number, int):  # as a double it may be that of another image
                            raise MasaError(f"{path}, row {row}: image_id {number!r} is not an integer.")
                        if number in seen:
                            raise MasaError(f"{name}: two images have this id.")
                        seen.add(number)
                        yield _scene(name, record, classes, rules, raw)
        except (pyarrow.ArrowException, OSError) as error:
            raise MasaError(f"{path} is corrupt after row {row} ({error}); fetch it again.") from error


def _scene(name: str, record: Mapping[str, Any], classes: int, rules: Rules, raw: Raw) -> Scene:
    if not record["image"] or not record["image"].get("bytes"):
        raise MasaError(f"{name}: no image.")
    data, size = record["image"]["bytes"], (record["width"], record["height"])
    pixels = decode(data, 3, name)
    _check_size(name, data, pixels, size, f"its columns say {size} (width, height)")
    objects = record["objects"]
    if isinstance(objects, list):  # a list of structs rather than a struct of lists
        objects = {key: [one.get(key) for one in objects] for key in ("bbox_id", "category", "bbox", "area")}
    try:
        labels = np.array([_integer(value) for value in objects["category"]], np.int64)
        ids = np.array([_integer(value) for value in objects.get("bbox_id") or range(len(labels))], np.int64)
        corners = np.array(objects["bbox"], np.float64).reshape(-1, 4)
    except (KeyError, TypeError, ValueError) as error:
        raise MasaError(f"{name}: objects cannot be read ({error}).") from error
    if len(corners) != len(labels):
        raise MasaError(f"{name}: {len(corners)} boxes, but {len(labels)} categories.")
    if (wrong := (labels < 0) | (labels >= classes)).any():
        i = int(wrong.argmax())
        raise MasaError(f"{name}: annotation {ids[i]} is of category {labels[i]}, which is not in 0..{classes - 1}.")
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    areas = objects.get("area") or xywh[:, 2] * xywh[:, 3]
    boxes = make_boxes(labels, np.zeros(len(labels)), xywh, areas)
    sizes = np.tile(np.array(size, np.float64), (len(xywh), 1))
    boxes, kept, counts = fit_boxes(name, ids, boxes, sizes, rules)
    raw.counts.update(counts)
    return Scene(name, record["image_id"], pixels, boxes[kept])
