"""Read box directories (of :mod:`masa.data.boxes`): splits as arrays, and the mirrored stream of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masa.data import pixels
from masa.data.box_records import BOX, IMAGE
from masa.data.pixels import TrainingImages, normalise, open_array
from masa.errors import MasaError, unknown
from masa.runs.files import verify
from masa.runs.run import read_json

Target = dict[str, Tensor]
"""``class_labels`` (n,) int64; ``boxes`` (n, 4) float32: (centre x, centre y, width, height) as parts of the image."""


class BoxSplit:
    """One split.

    Attributes:
        images: (N, S, S, 3) uint8, memory-mapped.
        records: (N,) of :data:`masa.data.box_records.IMAGE`.

    Raises:
        MasaError: a file is missing, damaged or of the wrong size.
    """

    def __init__(self, directory: Path, split: str) -> None:
        manifest = read_manifest(directory)
        if split not in manifest["splits"]:
            raise unknown(f"{directory}: split", split, manifest["splits"])
        record, size = manifest["splits"][split], manifest["image_size"]
        self.mean, self.std = manifest["mean"], manifest["std"]
        self.images = open_array(
            directory / f"{split}.bin", np.dtype(np.uint8), (record["images"], size, size, 3), "masa boxes"
        )
        self.records = np.array(open_array(directory / f"{split}-images.bin", IMAGE, (record["images"],), "masa boxes"))
        verify(directory, {f"{split}-images.bin": record.get("images_sha256")}, "make it anew with `masa boxes`")
        total = int(self.records["boxes"].sum())
        self._boxes = open_array(directory / f"{split}-boxes.bin", BOX, (total,), "masa boxes")
        files = {f"{split}.bin": record.get("sha256"), f"{split}-boxes.bin": record.get("boxes_sha256")}
        verify(directory, files, "make it anew with `masa boxes`")
        self._first = np.concatenate([[0], np.cumsum(self.records["boxes"])])

    def __len__(self) -> int:
        return len(self.records)

    def boxes(self, index: int) -> np.ndarray:
        """All boxes of an image, crowds included: (n,) of :data:`masa.data.box_records.BOX`."""
        return np.array(self._boxes[self._first[index] : self._first[index + 1]])

    def size(self, index: int) -> np.ndarray:
        """(width, height) of the original image."""
        return np.array([self.records[index]["width"], self.records[index]["height"]], np.float64)

    def target(self, index: int) -> Target:
        """What is to be found in an image: its boxes without crowds, cut off where they stick out."""
        boxes, size = self.boxes(index), self.size(index)
        boxes = boxes[boxes["crowd"] == 0]
        start = (boxes["xywh"][:, :2] / size).clip(0, 1)
        end = ((boxes["xywh"][:, :2] + boxes["xywh"][:, 2:]) / size).clip(0, 1)
        return {
            "class_labels": torch.from_numpy(boxes["label"].astype(np.int64)),
            "boxes": torch.from_numpy(np.concatenate([(start + end) / 2, end - start], 1)).float(),
        }

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[Tensor, list[Target]]]:
        """Normalised images (B, 3, S, S) and their targets, in stored order; the first ``limit`` alone where given."""
        end = min(limit or len(self), len(self))
        for start in range(0, end, size):
            stop = min(start + size, end)
            x = normalise(self.images[start:stop], self.mean, self.std)
            yield x, [self.target(i) for i in range(start, stop)]


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a box directory.

    Raises:
        MasaError: it is missing, or the directory holds something else.
    """
    manifest = read_json(directory / "manifest.json", "masa boxes")
    splits = manifest.get("splits") if isinstance(manifest, dict) else None
    if not isinstance(splits, dict) or not all(isinstance(s, dict) and "most_boxes" in s for s in splits.values()):
        raise MasaError(f"{directory / 'manifest.json'} is not one of images with boxes; make it with `masa boxes`.")
    return manifest


def check_fits(manifest: Mapping[str, Any], model: Mapping[str, Any], directory: Path) -> None:
    """See that images and boxes are what a detector reads and can find.

    Raises:
        MasaError: another image size or number of classes, or an image with more boxes than there are tokens.
    """
    pixels.check_fits(manifest, model, directory)
    for split in ("train", "validation"):
        most, tokens = manifest["splits"][split]["most_boxes"], model["num_detection_tokens"]
        if most > tokens:
            raise MasaError(
                f"model.num_detection_tokens = {tokens}, but an image of the {split} split in {directory} has {most} "
                "boxes, and each token finds one. Set it to at least that."
            )


class TrainingBoxes(TrainingImages):
    """The ``steps x batch_size`` images of a run, every epoch in a new order, half of them mirrored.

    Item i depends on the seed and i alone, as in :class:`masa.data.pixels.TrainingImages`.

    Args:
        split: the training images.
        items: length.
        seed: of order and mirroring.
        horizontal_flip: whether images are mirrored.
    """

    def __init__(self, split: BoxSplit, items: int, seed: int, horizontal_flip: bool) -> None:
        super().__init__(split, items, seed, None)  # type: ignore[arg-type]
        self.horizontal_flip = horizontal_flip

    def __getitem__(self, item: int) -> dict[str, Any]:
        index = self.index(item)
        x = normalise(self.split.images[index][None], self.split.mean, self.split.std)[0]
        target = self.split.target(index)  # type: ignore[attr-defined]
        if self.horizontal_flip and np.random.default_rng([self.seed, item, 1]).random() < 0.5:
            x, target = mirrored(x, target)
        return {"pixel_values": x, "labels": target}


def mirrored(x: Tensor, target: Target) -> tuple[Tensor, Target]:
    """An image (3, S, S) and its boxes, left and right exchanged."""
    boxes = target["boxes"].clone()
    boxes[:, 0] = 1 - boxes[:, 0]
    return x.flip(2), target | {"boxes": boxes}


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack examples to ``pixel_values`` (B, 3, S, S); ``labels`` are the list of their targets."""
    return {
        "pixel_values": torch.stack([e["pixel_values"] for e in examples]),
        "labels": [e["labels"] for e in examples],
    }
