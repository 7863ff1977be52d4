"""A Vision Transformer for others: a folder for timm (``local-dir:``), which transformers reads, too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from masa.data.pixels import data_digest as data_digest
from masa.export.source import Source
from masa.models import timm_vit

FORMATS = ("hf",)
LIBRARY, TASK = "timm", "image-classification"
READ = 'import timm\nmodel = timm.create_model("local-dir:.", pretrained=True)'
LOGITS = ""


def write(model: nn.Module, folder: Path, source: Source) -> None:
    """Write the folded model; means, deviations and class names are in its configuration."""
    timm_vit.save_plain(model, folder)


def describe_data(source: Source) -> dict[str, Any]:
    """Rows of the card's section on data."""
    return picture_rows(source.data, ("sha256", "labels_sha256"))


def picture_rows(data: Mapping[str, Any] | None, sums: tuple[str, ...]) -> dict[str, Any]:
    """The rows that image and box directories have in common."""
    if data is None:
        return {}
    rows = {"data set": data["dataset"], "source": data.get("source"), "classes": ", ".join(map(str, data["classes"]))}
    for name, split in data["splits"].items():
        checks = ", ".join(str(split[key]) for key in sums if key in split)
        rows[f"{name} images"] = f"{split['images']:,} (sha256 {checks})"
    return rows | {"mean": data["mean"], "standard deviation": data["std"]}


def example(model: nn.Module) -> torch.Tensor:
    """Images (2, channels, height, width) to compare logits on."""
    channels, height, width = model.pretrained_cfg["input_size"]
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))


def usage(source: Source) -> str:
    """Python that loads the exported folder and classifies; it runs in that folder."""
    return (
        "import timm\nimport torch\nfrom PIL import Image\n\n"
        'model = timm.create_model("local-dir:.", pretrained=True).eval()  # this folder\n'
        "settings = timm.data.resolve_model_data_config(model)\n"
        "transform = timm.data.create_transform(**settings, is_training=False)\n"
        'channels, height, width = settings["input_size"]\n'
        'image = Image.new("RGB" if channels == 3 else "L", (width, height))  # your picture\n'
        "print(model(transform(image).unsqueeze(0)).softmax(-1).topk(2))\n"
    )


def limits(source: Source, config: Mapping[str, Any]) -> list[str]:
    """What a reader must know before use."""
    _, height, width = config["pretrained_cfg"]["input_size"]
    return [f"It reads images of {height} x {width} pixels, and knows the classes above and nothing else."]
