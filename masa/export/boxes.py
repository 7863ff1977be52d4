"""A detector for others: a folder for transformers, with its image processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from masa.data.pixels import data_digest as data_digest
from masa.errors import MasaError
from masa.export.images import picture_rows
from masa.export.source import Source
from masa.models import detector

FORMATS = ("hf",)
LIBRARY, TASK = "transformers", "object-detection"
READ = (
    "from transformers import AutoModelForObjectDetection\n"
    'model = AutoModelForObjectDetection.from_pretrained(".", local_files_only=True)'
)
LOGITS = ".logits"


def write(model: nn.Module, folder: Path, source: Source) -> None:
    """Write the folded model and its image processor.

    Raises:
        MasaError: the boxes' means and deviations, which the processor needs, are not known.
    """
    if source.data is None:
        raise MasaError(
            f"The images' mean and standard deviation are in the data of {source.name}, which were not found as it was "
            "trained on them. Say where they are with --data DIR (what `masa boxes` wrote)."
        )
    detector.save_plain(model, folder, source.data["mean"], source.data["std"])


def describe_data(source: Source) -> dict[str, Any]:
    """Rows of the card's section on data."""
    return picture_rows(source.data, ("images_sha256", "boxes_sha256", "sha256"))


def example(model: nn.Module) -> torch.Tensor:
    """Images (2, channels, height, width) to compare logits on."""
    height, width = model.config.image_size
    return torch.rand(2, model.config.num_channels, height, width, generator=torch.Generator().manual_seed(0))


def usage(source: Source) -> str:
    """Python that loads the exported folder and finds objects; it runs in that folder."""
    return (
        "from PIL import Image\nfrom transformers import AutoImageProcessor, AutoModelForObjectDetection\n\n"
        'folder = "."  # this folder, or its name on the hub\n'
        "processor = AutoImageProcessor.from_pretrained(folder)\n"
        "model = AutoModelForObjectDetection.from_pretrained(folder)\n"
        'image = Image.new("RGB", (64, 48))  # your picture\n'
        'outputs = model(**processor(image, return_tensors="pt"))\n'
        "print(processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=[(48, 64)]))\n"
    )


def limits(source: Source, config: Mapping[str, Any]) -> list[str]:
    """What a reader must know before use."""
    height, width = config["image_size"]
    return [
        f"Pictures are scaled to {height} x {width} pixels; at most {config['num_detection_tokens']} objects are "
        "found, of the classes above and no others."
    ]
