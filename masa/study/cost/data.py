"""Preparing data: downloads, tokenizer, tokens, images, boxes. Rough, since a network decides most of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from masa.data import box_spec, image_sets

NETWORK = 3e7
"""Bytes a second of downloads."""

REFERENCE_STARTUP = 5.5
"""Start-up in seconds of the machine that the rates below were taken on; others are scaled by theirs."""

WHEEL = 8.6e7
"""Bytes of the wheel with the tasks' data."""

BYTES_PER_TOKEN = {True: 3.2, False: 4.5}
"""Bytes of English text a token, under a small vocabulary (True) and one of 32,000 or more."""

BPE = 1.2e-6
"""Seconds a byte of text from which a BPE is trained."""

TOKENIZE = 5e-7
"""Seconds a byte of text that is tokenised, hashed and written, on one core."""

IMAGES = {
    # training, held-out and test images together, those that are trained on before a part is held out, megabytes
    "digits": (1797, 1797, 0.1),
    "mnist-5k": (5000, 5000, 1.5),
    "cifar10": (60000, 50000, 145),
    "cifar100": (60000, 50000, 145),
    "tiny-imagenet": (110000, 100000, 160),
}
"""Data sets of :data:`masa.data.image_sets.DATASETS`."""

COCO = (123287, 118287, 19_300)
"""The same of COCO 2017; unpacked by the user."""


def is_remote(source: str | None) -> bool:
    """Whether a source is downloaded."""
    return bool(source) and str(source).startswith(("pypi:", "hub:"))


def images_of(section: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    """Training images (what is held out taken off) and test images of a data set; unknown ones count as CIFAR."""
    full = _resolved(section, entry)
    kept = 1 - full["validation_fraction"]
    if section == "boxes":
        drawn = entry["dataset"] == "shapes"
        return (
            (round(full["count"] * kept), full["test_count"]) if drawn else (round(COCO[1] * kept), COCO[0] - COCO[1])
        )
    total, training, _ = IMAGES.get(entry["dataset"], (60000, 50000, 145))
    if total == training:  # no test split of its own
        test = round(training * full["test_fraction"])
        return round(training * kept - test), test
    return round(training * kept), total - training


def _resolved(section: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    resolve = image_sets.resolve if section == "images" else box_spec.resolve
    return resolve(image_sets.spec_of(entry))


def validation_images(section: str, entry: Mapping[str, Any]) -> float:
    """Images of one held-out score."""
    training, _ = images_of(section, entry)
    fraction = _resolved(section, entry)["validation_fraction"]
    return training * fraction / (1 - fraction)


def pixel_bytes(section: str, entry: Mapping[str, Any], model: Mapping[str, Any]) -> float:
    """Bytes of the pixel files."""
    training, test = images_of(section, entry)
    return (training * 1.05 + test) * model["image_size"] ** 2 * model["channels"]


def corpus_bytes(config: Mapping[str, Any], tokens: float) -> float:
    """Bytes of text behind so many tokens."""
    return tokens * BYTES_PER_TOKEN[config["data"]["tokenizer"]["vocab_size"] < 8192]
