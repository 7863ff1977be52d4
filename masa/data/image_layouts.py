"""Folders of images as they are handed around: Parquet, CIFAR's pickles, ImageNet's folders, a folder a class.

A layout is one entry of :data:`LAYOUTS`: a function that says what it found, or None where a folder is not of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from masa.data import cifar_pickles
from masa.data.decoding import decode
from masa.data.image_sets import ImageDataset
from masa.data.parquet_files import ALIASES, count_rows, open_parquet, parquet_files, same_classes
from masa.errors import MasaError, unknown
from masa.runs import files
from masa.runs.run import read_json

Example = tuple[str, np.ndarray, int]
"""Where an image comes from (for messages), its pixels (H, W, C) uint8, its label."""

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"))
"""Files of a folder that are images, whatever the case of their letters."""


def _is_beside(name: str) -> bool:
    """Whether a system or an archive puts it beside what is meant: ``._1.png``, ``__MACOSX``."""
    return name.startswith(".") or name == "__MACOSX"


def _is_image(path: Path, below: Path) -> bool:
    inside = path.relative_to(below).parts
    return path.suffix.lower() in SUFFIXES and not any(map(_is_beside, inside)) and not path.is_dir()


@dataclass(frozen=True)
class Raw:
    """What a reader found: class names in the order of the labels, and the examples of each stored split."""

    classes: list[str]
    splits: Mapping[str, Iterable[Example]]
    sizes: Mapping[str, int]
    titles: list[str] | None = None
    files: Mapping[str, str] | None = None


def read(root: Path, entry: ImageDataset, source: str) -> Raw:
    """A folder in any of the layouts.

    Args:
        source: names the folder in messages.

    Raises:
        MasaError: it is in none of them, or something is missing or wrong; the file is named.
    """
    for layout in LAYOUTS.values():
        if (found := layout(root, entry)) is not None:
            return found
    packed = sorted(p.name for p in root.iterdir() if p.name.endswith((".zip", ".tar", ".tgz", ".tar.gz")))
    mend = f" Unpack {packed[0]} first." if packed else ""
    raise MasaError(f"{source}: no file {root}/**/train*.parquet, nor another layout: {'; '.join(LAYOUTS)}.{mend}")


# -------------------------------------------------------------------------------------------------------- Parquet


def read_parquet(root: Path, entry: ImageDataset) -> Raw | None:
    """Parquet files in the hub's layouts: encoded images, integer labels, class names in the schema."""
    found = {split: parquet_files(root, split) for split in ("train", entry.test or "train")}
    if not any(found.values()):
        return None
    for split, paths in found.items():
        if not paths:
            raise MasaError(f"{root}: no file {root}/**/{split}*.parquet, but other splits are there.")
    names = same_classes({path: _class_names(path, entry) for paths in found.values() for path in paths})
    titles = root / "class_names.json"
    return Raw(
        names,
        {split: _rows(paths, entry) for split, paths in found.items()},
        {split: sum(map(count_rows, paths)) for split, paths in found.items()},
        [_title(read_json(titles), name) for name in names] if titles.is_file() else None,
        {str(p.relative_to(root)): files.sha256_of(p) for paths in found.values() for p in paths},
    )


def _title(titles: Any, name: str) -> str:
    """The first of several English names, e.g. "goldfish, Carassius auratus"."""
    return str(titles.get(name, name)).split(",")[0] if isinstance(titles, dict) else name


def _class_names(path: Path, entry: ImageDataset) -> list[str]:
    from datasets import ClassLabel, Features

    with open_parquet(path) as file:
        schema = file.schema_arrow
    for column in (entry.image, entry.label):
        if column not in schema.names:
            raise unknown(f"{path}: column", column, schema.names)
    label = Features.from_arrow_schema(schema).get(entry.label)
    if not isinstance(label, ClassLabel) or not label.names:
        raise MasaError(f"{path}: the schema does not name the classes of {entry.label!r} (a ClassLabel feature).")
    return list(label.names)


def _rows(paths: list[Path], entry: ImageDataset) -> Iterator[Example]:
    import pyarrow

    for path in paths:
        row = 0
        try:
            with open_parquet(path) as file:
                for batch in file.iter_batches(batch_size=256, columns=[entry.image, entry.label]):
                    for image, label in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                        row += 1
                        name = f"{path}, row {row}"
                        if not image or not image.get("bytes"):
                            raise MasaError(f"{name}: no image.")
                        name += f" ({image['path']})" if image.get("path") else ""
                        if label is None:
                            raise MasaError(f"{name}: no label.")
                        yield name, decode(image["bytes"], entry.channels, name), label
        except (pyarrow.ArrowException, OSError) as error:
            raise MasaError(f"{path} is corrupt after row {row} ({error}); fetch it again.") from error


# -------------------------------------------------------------------------------------------------- CIFAR's pickles


def read_pickles(root: Path, entry: ImageDataset) -> Raw | None:
    """CIFAR's own: ``data_batch_1`` to ``5``, ``test_batch``, ``batches.meta``; or ``train``, ``test``, ``meta``."""
    for folder in (root, root / "cifar-10-batches-py", root / "cifar-100-python"):
        for meta, train, test in (
            ("batches.meta", tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)),
            ("meta", ("train",), ("test",)),
        ):
            if (folder / meta).is_file() and any((folder / name).is_file() for name in train):
                return _pickled(folder, meta, {"train": train, entry.test or "test": test}, entry)
    return None


def _pickled(folder: Path, meta: str, splits: Mapping[str, tuple[str, ...]], entry: ImageDataset) -> Raw:
    names = cifar_pickles.read(folder / meta).get(f"{entry.label}_names")
    if not isinstance(names, list):
        raise MasaError(f"{folder / meta} does not name the classes ({entry.label}_names).")
    paths = {split: [folder / name for name in members] for split, members in splits.items()}
    for path in (p for of_split in paths.values() for p in of_split):
        if not path.is_file():
            raise MasaError(f"{path} is missing; the other files of CIFAR are there. Unpack the archive again.")
    batches = {split: sum(len(_batch(p, entry)[1]) for p in of_split) for split, of_split in paths.items()}
    return Raw(
        [str(name) for name in names],
        {split: _pickled_images(of_split, entry) for split, of_split in paths.items()},
        batches,
        files={p.name: files.sha256_of(p) for p in [folder / meta, *(p for some in paths.values() for p in some)]},
    )


def _batch(path: Path, entry: ImageDataset) -> tuple[np.ndarray, list[int]]:
    """Pixels (N, channels, size, size) and labels of one file."""
    found, size = cifar_pickles.read(path), entry.image_size
    data, labels = found.get("data"), found.get(f"{entry.label}s")
    whole = entry.channels * size * size
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != whole:
        raise MasaError(f"{path}: 'data' is not an array of rows of {whole} bytes.")
    if not isinstance(labels, list) or len(labels) != len(data) or not all(type(label) is int for label in labels):
        raise MasaError(f"{path}: {entry.label}s is not a list of {len(data)} integers.")
    return data.reshape(-1, entry.channels, size, size), labels


def _pickled_images(paths: list[Path], entry: ImageDataset) -> Iterator[Example]:
    for path in paths:
        for i, (pixels, label) in enumerate(zip(*_batch(path, entry), strict=True)):
            yield f"{path}, image {i}", pixels.transpose(1, 2, 0), label


# ---------------------------------------------------------------------------------------------- a folder a class


def read_folders(root: Path, entry: ImageDataset) -> Raw | None:
    """A folder a class below ``train`` and the test split, with or without a further ``images`` between.

    Tiny ImageNet's validation images lie together, and ``val/val_annotations.txt`` says their classes; ``words.txt``
    has their English names. Labels are the places of the classes in alphabetical order, as in the copies on the hub.
    """
    beside = sorted(p for p in root.iterdir() if not _is_beside(p.name))
    inside = [p for p in (root, *beside) if (p / "train").is_dir()]
    if len(inside) > 1:
        raise MasaError(f"{inside[0]} and {inside[1]} both have a folder train. Name the one that is meant as source.")
    root = inside[0] if inside else root
    classes = sorted(p.name for p in root.glob("train/[!.]*") if p.is_dir())
    if not classes:
        return None
    listed = root / "wnids.txt"
    if listed.is_file() and (missing := set(listed.read_text(encoding="utf-8").split()) - set(classes)):
        raise MasaError(f"{root / 'train'} has no folder {min(missing)}, which {listed} lists ({len(missing)} in all).")
    label = {name: i for i, name in enumerate(classes)}
    found = {"train": _of_classes(root / "train", label)}
    if entry.test:
        places = [root / name for name in (entry.test, *ALIASES.get(entry.test, ())) if (root / name).is_dir()]
        if not places:
            raise MasaError(f"{root} has a folder train, but none of the {entry.test} split beside it.")
        annotated = places[0] / "val_annotations.txt"
        found[entry.test] = _annotated(annotated, label) if annotated.is_file() else _of_classes(places[0], label)
    words, titles = root / "words.txt", None
    if words.is_file():
        lines = (line.partition("\t") for line in words.read_text(encoding="utf-8").splitlines())
        known = {name: title for name, _, title in lines}
        titles = [_title(known, name) for name in classes]
    return Raw(
        classes,
        {split: _files(some, entry) for split, some in found.items()},
        {split: len(some) for split, some in found.items()},
        titles,
        {str(p.relative_to(root)): files.sha256_of(p) for p in sorted(root.glob("*/val_annotations.txt"))},
    )


def _of_classes(folder: Path, label: Mapping[str, int]) -> list[tuple[Path, int]]:
    """The images of every class, class after class."""
    found = []
    for place in sorted(p for p in folder.glob("[!.]*") if p.is_dir()):
        if place.name not in label:
            raise unknown(f"{place}: class", place.name, label)
        images = sorted(p for p in place.rglob("*") if _is_image(p, place))
        if not images:
            raise MasaError(f"{place} holds no image ({', '.join(sorted(SUFFIXES))}).")
        found += [(path, label[place.name]) for path in images]
    return found


def _annotated(file: Path, label: Mapping[str, int]) -> list[tuple[Path, int]]:
    """Images of ``images/`` with the class that a line of the file gives them: name, class, and a box."""
    found, folder = [], file.parent / "images"
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0].strip()
        if wnid not in label:
            raise MasaError(f"{file}, line {number}: {wnid!r} is no class of the training images.")
        if "/" in name or not (folder / name).is_file():
            raise MasaError(f"{file}, line {number}: {folder / name} does not exist.")
        found.append((folder / name, label[wnid]))
    if more := {p.name for p in folder.iterdir() if _is_image(p, folder)} - {p.name for p, _ in found}:
        raise MasaError(f"{file} has no line for {min(more)} ({len(more)} images in all).")
    return found


def _files(chosen: list[tuple[Path, int]], entry: ImageDataset) -> Iterator[Example]:
    for path, label in chosen:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise MasaError(f"{path} cannot be read ({error.strerror}).") from error
        yield str(path), decode(data, entry.channels, str(path)), label


LAYOUTS: dict[str, Callable[[Path, ImageDataset], Raw | None]] = {
    "Parquet (train*.parquet, or train/0000.parquet as the hub converts)": read_parquet,
    "CIFAR's pickles (data_batch_1 to 5 and test_batch, or train and test, with meta)": read_pickles,
    "a folder a class (train/CLASS/…, also tiny-imagenet-200's train/WNID/images)": read_folders,
}
