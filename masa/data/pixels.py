"""Read image directories (of :mod:`masa.data.images`): splits as arrays, and the augmented stream of a run."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masa.data.tokens import some
from masa.errors import MasaError, unknown
from masa.runs.files import verify
from masa.runs.run import digest, read_json

SPLITS = ("train", "validation", "test")
LABELS = np.dtype("<i8")

OURS = ("input_size", "is_training", "mean", "std", "use_prefetcher", "normalize", "separate", "tf_preprocessing")
"""Arguments of timm's ``create_transform`` that follow from the data, and may not be set."""


class ImageSplit:
    """One split: ``images`` (N, H, W, C) uint8, memory-mapped, and ``labels`` (N,) int64.

    Raises:
        MasaError: a file is missing, damaged or of the wrong size, or the split is empty.
    """

    def __init__(self, directory: Path, split: str) -> None:
        manifest = read_manifest(directory)
        if split not in manifest["splits"]:
            raise unknown(f"{directory}: split", split, manifest["splits"])
        size, channels = manifest["image_size"], manifest["channels"]
        count = manifest["splits"][split]["images"]
        if not count:
            raise MasaError(f"{directory}: the {split} split is empty.")
        self.mean, self.std = manifest["mean"], manifest["std"]
        shape = (count, size, size, channels)
        self.images = open_array(directory / f"{split}.bin", np.dtype(np.uint8), shape)
        self.labels = np.array(open_array(directory / f"{split}-labels.bin", LABELS, (count,)))
        record = manifest["splits"][split]
        names = {f"{split}.bin": record.get("sha256"), f"{split}-labels.bin": record.get("labels_sha256")}
        verify(directory, names, "make it anew with `masa images`")

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images (B, C, H, W) and labels (B,), in stored order; the first ``limit`` alone where given."""
        end = min(limit or len(self), len(self))
        for start in range(0, end, size):
            stop = min(start + size, end)
            labels = torch.from_numpy(self.labels[start:stop])
            yield normalise(self.images[start:stop], self.mean, self.std), labels


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an image directory.

    Raises:
        MasaError: it is missing, or the directory holds something else.
    """
    manifest = read_json(directory / "manifest.json", "masa images")
    if not isinstance(manifest, dict) or "classes" not in manifest or "splits" not in manifest:
        raise MasaError(f"{directory / 'manifest.json'} is not one of images; make it with `masa images`.")
    return manifest


def data_digest(manifest: Mapping[str, Any]) -> str:
    """Hash of the images that a run is trained and validated on: they decide its bits."""
    files = ("sha256", "labels_sha256", "images_sha256", "boxes_sha256")
    splits = {split: manifest["splits"][split] for split in ("train", "validation")}
    return digest({name: [record[k] for k in files if k in record] for name, record in splits.items()})


def check_trained_on(manifest: Mapping[str, Any], run_dir: Path, directory: Path) -> None:
    """See that images are those that a run was trained on: of others, some of its test could have been.

    Raises:
        MasaError: they are not.
    """
    inputs = read_json(run_dir / "provenance.json")["inputs"]
    if data_digest(manifest) not in inputs.values():
        raise MasaError(
            f"{run_dir} was trained on other images than those in {directory}, whose test images it may have seen. "
            "Evaluate it on its own."
        )


def with_steps(spec: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved run spec with the name of its data, and epochs turned into steps by the number of images."""
    recipe = dict(spec["training"])
    if recipe["epochs"] is not None:
        recipe["steps"] = math.ceil(recipe["epochs"] * manifest["splits"]["train"]["images"] / recipe["batch_size"])
    return {**spec, "training": recipe, "data": manifest["dataset"]}


def check_fits(manifest: Mapping[str, Any], model: Mapping[str, Any], directory: Path) -> None:
    """See that images are what a model reads.

    Raises:
        MasaError: another size, number of channels or number of classes.
    """
    for key, found in (
        ("image_size", manifest["image_size"]),
        ("channels", manifest["channels"]),
        ("num_classes", len(manifest["classes"])),
    ):
        if model[key] != found:
            raise MasaError(
                f"model.{key} = {model[key]}, but the {manifest['dataset']} images in {directory} have {found}. "
                f"Set it to {found}, or choose other images."
            )


def normalise(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, H, W, C) uint8 -> (B, C, H, W) float32 of mean 0 and standard deviation 1 over the training images."""
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    shape = (1, -1, 1, 1)
    return ((x - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)).contiguous()


def open_array(path: Path, dtype: np.dtype, shape: tuple[int, ...], made_by: str = "masa images") -> np.ndarray:
    """A memory-mapped array.

    Raises:
        MasaError: the file is missing or has another size; the command that makes it anew is named.
    """
    expected = int(np.prod(shape)) * dtype.itemsize
    actual = path.stat().st_size if path.is_file() else -1
    if actual != expected:
        raise MasaError(
            f"{path} {'is missing' if actual < 0 else f'has {actual} bytes'}, expected {expected}; make it anew with "
            f"`{made_by}`."
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=shape) if expected else np.empty(shape, dtype)


class Moments:
    """Mean and standard deviation of each channel over many images, from exact sums of integers."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sum, self.squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)

    def add(self, pixels: np.ndarray) -> None:
        """Count one image, (H, W, C) uint8."""
        flat = pixels.reshape(-1, len(self.sum)).astype(np.int64)
        self.count += len(flat)
        self.sum += flat.sum(0)
        self.squares += (flat * flat).sum(0)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, of pixels in [0, 1]."""
        mean = self.sum / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 1.0))
        return [round(float(x) / 255, 6) for x in mean], [round(float(x) / 255, 6) for x in std]


class TrainingImages(torch.utils.data.Dataset):
    """The ``steps x batch_size`` images of a run, every epoch in a new order, augmented by timm.

    Item i depends on the seed and i alone, so that a resumed run, another number of workers and another method see the
    same images.

    Args:
        split: the training images.
        items: length.
        seed: of order and augmentation.
        augmentation: arguments of ``timm.data.create_transform`` by their own names, or None for plain images.
    """

    def __init__(self, split: ImageSplit, items: int, seed: int, augmentation: Mapping[str, Any] | None) -> None:
        self.split, self.items, self.seed = split, items, seed
        self.transform = make_transform(augmentation, split) if augmentation is not None else None
        self._epoch, self._order = -1, np.empty(0, int)

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = self.index(item)
        image = self.split.images[index]
        if self.transform is None:
            x = normalise(image[None], self.split.mean, self.split.std)[0]
        else:
            from PIL import Image

            with drawn_from(self.seed, item):
                x = self.transform(Image.fromarray(np.array(image if image.shape[2] == 3 else image[:, :, 0])))
        return {"item": item, "pixel_values": x, "labels": int(self.split.labels[index])}

    def where(self, items: range) -> str:
        """Which training images a range of items are (numbers in train.bin, from 0), for messages."""
        return some(items, lambda item: str(self.index(item)), "training images", most=32)

    def index(self, item: int) -> int:
        """Which training image item i is."""
        epoch, position = divmod(item, len(self.split))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.split))
            self._epoch = epoch
        return int(self._order[position])


class Collate:
    """Stack examples to ``pixel_values`` (B, C, H, W) and ``labels``: (B,) class numbers, or (B, classes) mixed.

    Args:
        mixup: arguments of ``timm.data.Mixup`` by their own names, or None.
    """

    def __init__(self, seed: int, num_classes: int, mixup: Mapping[str, Any] | None) -> None:
        self.seed, self.mixup = seed, None
        if mixup is not None:
            from timm.data import Mixup

            ours = ("num_classes", "label_smoothing", "multi_label")
            _check_names("training.mixup", mixup, Mixup, ours)
            self.mixup = Mixup(**mixup, num_classes=num_classes, label_smoothing=0.0)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        x = torch.stack([e["pixel_values"] for e in examples])
        y = torch.tensor([e["labels"] for e in examples])
        if self.mixup is not None:
            with drawn_from(self.seed, examples[0]["item"], 1):
                x, y = self.mixup(x, y)
        return {"pixel_values": x, "labels": y}


def make_transform(augmentation: Mapping[str, Any], split: ImageSplit) -> Callable[[Any], Tensor]:
    """timm's training transform for the images of a split, ending in a normalised tensor (C, H, W).

    Raises:
        MasaError: an argument that timm does not know, or refuses.
    """
    from timm.data import create_transform

    _check_names("training.augmentation", augmentation, create_transform, OURS)
    _, height, width, channels = split.images.shape
    try:
        transform = create_transform(
            (channels, height, width),
            is_training=True,
            mean=tuple(split.mean),
            std=tuple(split.std),
            **{k: tuple(v) if isinstance(v, list) else v for k, v in augmentation.items()},
        )
    except (AssertionError, TypeError, ValueError, KeyError, IndexError) as error:
        reason = str(error) or type(error).__name__
        raise MasaError(f"training.augmentation: timm refuses {dict(augmentation)} ({reason}).") from error
    for op in _augment_ops(transform):
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return transform


def _augment_ops(transform: Any) -> Iterator[Any]:
    """The operations of timm's RandAugment, AutoAugment or AugMix inside a transform."""
    for part in transform.transforms:
        yield from getattr(part, "ops", ())
        yield from (op for policy in getattr(part, "policy", ()) for op in policy)


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    """Keep the highest bits of every pixel. timm's ranges begin at none of them, which Pillow 13 refuses."""
    from PIL import ImageOps

    return ImageOps.posterize(image, bits) if bits else image.point(lambda _: 0)


def _check_names(where: str, given: Mapping[str, Any], function: Callable[..., Any], ours: Sequence[str]) -> None:
    known = [name for name in inspect.signature(function).parameters if name not in ours]
    for name in given:
        if name not in known:
            raise unknown(f"{where}: argument", name, known)


@contextmanager
def drawn_from(*key: int) -> Iterator[None]:
    """Draw the random numbers of Python, NumPy and torch's CPU generator from a key, and leave no trace."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the GPU's, too
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
