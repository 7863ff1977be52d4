"""timm's VisionTransformer as Hugging Face's TimmWrapper, which the Trainer trains and checkpoints store.

A folded model is a plain timm model: :func:`save_plain` writes the folder that ``timm.create_model("local-dir:…")`` and
``AutoModelForImageClassification.from_pretrained`` read. There is no modelling code of ours to trust.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from masa.errors import MasaError
from masa.models import vit
from masa.runs.files import whole_file
from masa.sharing.fold import fold
from masa.sharing.share import share

PACKAGES = ("timm", "torchvision", "pillow")
"""What a result depends on beside the packages of all runs."""

ARCHITECTURE = "vit_tiny_patch16_224"
"""timm's entry point; every size of it is overridden."""


def build(
    model: Mapping[str, Any],
    sharing: Mapping[str, Any],
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A newly initialised Vision Transformer that shares weights as ``sharing`` says.

    Args:
        model: see :mod:`masa.models.vit`.
        sharing: fields of :class:`masa.SharingSpec`.
        classes: names of the classes, stored with the model; by default their numbers.
        mean, std: of the training images in each channel, in [0, 1], stored as timm's data configuration.

    Returns:
        A ``TimmWrapperForImageClassification``; its ``timm_model`` maps (B, channels, H, W) to logits (B, classes).

    Raises:
        MasaError: sizes that do not fit, as many class names as there are classes, or a sharing that does not fit.

    Weights are drawn from torch's global generator as timm draws them (truncated normal of 0.02, zero biases).
    """
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    full = vit.resolve(model)
    count, channels, size = full["num_classes"], full["channels"], full["image_size"]
    names = list(classes) if classes is not None else [str(i) for i in range(count)]
    if len(names) != count:
        raise MasaError(f"model.num_classes = {count}, but the data has {len(names)} classes.")
    config = TimmWrapperConfig(
        architecture=ARCHITECTURE,
        initializer_range=0.02,
        model_args={
            "img_size": size,
            "patch_size": full["patch_size"],
            "in_chans": channels,
            "embed_dim": full["hidden_size"],
            "depth": full["num_layers"],
            "num_heads": full["num_attention_heads"],
            "mlp_ratio": _ratio(full["intermediate_size"], full["hidden_size"]),
            "class_token": full["global_pool"] == "token",
            **{k: full[k] for k in ("global_pool", "drop_rate", "attn_drop_rate", "drop_path_rate")},
        },
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        pretrained_cfg={
            "input_size": [channels, size, size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(mean or [0.5] * channels),
            "std": list(std or [0.5] * channels),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    )
    return share(TimmWrapperForImageClassification(config), sharing)


def _ratio(wide: int, width: int) -> float:
    """The ratio by which timm gets ``wide`` from ``width``: it rounds their product down, 448 x (488 / 448) to 487."""
    exact = wide / width
    return exact if int(width * exact) == wide else (wide + 0.5) / width


def plain(model: nn.Module) -> nn.Module:
    """The folded timm model inside what :func:`build` or :func:`masa.load` returned; ``model`` is not changed."""
    folded = fold(model)
    return getattr(folded, "timm_model", folded)


def save_plain(model: nn.Module, directory: str | Path) -> Path:
    """Write the folded model as a timm checkpoint: ``config.json`` and ``model.safetensors``, without masa.

    Example (a folder that needs timm alone)::

        save_plain(masa.load("results/runs/…/model"), "plain")
        timm.create_model("local-dir:plain", pretrained=True)
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(directory)
    tensors = {name: t.detach().contiguous().cpu() for name, t in plain(model).state_dict().items()}
    with whole_file(directory / "model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
    return directory
