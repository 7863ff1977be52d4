"""transformers' YOLOS, a Vision Transformer whose last tokens are boxes, and the loss that it is trained with.

A folded model is a plain ``YolosForObjectDetection``; :func:`save_plain` writes the folder that its ``from_pretrained``
and image processor read. There is no modelling code of ours to trust, and the matching and losses are transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masa.data.boxed_images import Target
from masa.errors import MasaError
from masa.models import vit, yolos
from masa.sharing.fold import fold
from masa.sharing.share import share

PACKAGES = ("torchvision", "torchmetrics", "pycocotools", "pillow", "scipy")
"""What a result depends on beside the packages of all runs."""

TOKENS = (
    "embeddings.cls_token",
    "embeddings.detection_tokens",
    "embeddings.position_embeddings",
    "encoder.interpolation.mid_position_embeddings",
)
"""Parameters of the encoder that are neither matrices nor biases. YOLOS does not let them decay."""


def build(model: Mapping[str, Any], sharing: Mapping[str, Any], classes: Sequence[str] | None = None) -> nn.Module:
    """A newly initialised YOLOS whose encoder shares weights as ``sharing`` says.

    Args:
        model: see :mod:`masa.models.yolos`.
        sharing: fields of :class:`masa.SharingSpec`.
        classes: names of the classes, stored with the model; by default their numbers.

    Returns:
        A ``YolosForObjectDetection``: (B, 3, S, S) -> logits (B, T, classes + 1), the last one "no object", and boxes
        (B, T, 4) as parts of the image (centre x, centre y, width, height), of its T detection tokens.

    Raises:
        MasaError: sizes that do not fit, another number of names than of classes, or a sharing that does not fit.

    Weights are drawn from torch's global generator. transformers leaves the tokens and position embeddings at zero, for
    a checkpoint to fill; they are drawn as YOLOS' own code does (truncated normal of 0.02), as equal tokens would all
    find the same box. So are the two heads (torch's default for linear layers), which N(0, 0.02²) makes almost blind.
    """
    from transformers import YolosConfig, YolosForObjectDetection

    full = yolos.resolve(model)
    count = full["num_classes"]
    names = list(classes) if classes is not None else [str(i) for i in range(count)]
    if len(names) != count:
        raise MasaError(f"model.num_classes = {count}, but the data has {len(names)} classes.")
    config = YolosConfig(
        hidden_size=full["hidden_size"],
        num_hidden_layers=full["num_layers"],
        num_attention_heads=full["num_attention_heads"],
        intermediate_size=full["intermediate_size"],
        image_size=[full["image_size"]] * 2,
        patch_size=full["patch_size"],
        num_channels=full["channels"],
        **{key: full[key] for key in yolos.Model.model_fields if key not in vit.Patches.model_fields},
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    made = YolosForObjectDetection(config)
    for parameter in tokens(made).values():
        nn.init.trunc_normal_(parameter, std=config.initializer_range)
    for head in (made.class_labels_classifier, made.bbox_predictor):
        for layer in head.layers:
            layer.reset_parameters()
    return share(made, sharing)


def tokens(model: nn.Module) -> dict[str, nn.Parameter]:
    """:data:`TOKENS` of a detector, by name; the last exists only with ``use_mid_position_embeddings``."""
    return {name: p for name, p in model.base_model.named_parameters() if name in TOKENS}


def save_plain(model: nn.Module, directory: str | Path, mean: Sequence[float], std: Sequence[float]) -> Path:
    """Write the folded model and its image processor, which transformers reads without masa.

    Args:
        mean, std: of the training images (``manifest.json`` of the box directory).

    Example (a folder that needs transformers alone)::

        save_plain(masa.load("results/runs/…/model"), "plain", manifest["mean"], manifest["std"])
        transformers.pipeline("object-detection", "plain")("picture.jpg")
    """
    from transformers import YolosImageProcessor

    folded = fold(model)
    folded.save_pretrained(directory)
    height, width = folded.config.image_size
    YolosImageProcessor(
        size={"height": height, "width": width}, do_pad=False, image_mean=list(mean), image_std=list(std)
    ).save_pretrained(directory)
    return Path(directory)


class Criterion:
    """YOLOS' loss of a part of a batch: transformers' matching and losses, divided by the numbers of the whole batch.

    Cross-entropy is divided by the sum of its weights (1 of every box, ``eos_coefficient`` of every token without one)
    and the losses of the boxes by their number. With these numbers of the whole batch, the parts of a batch sum up to
    its loss exactly, however it is cut; a mean of the parts' own means would weigh the boxes of crowded parts less.
    """

    def __init__(self, config: Any) -> None:
        from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

        self.config = config
        self.matcher = HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
        self.losses = ImageLoss(self.matcher, config.num_labels, config.eos_coefficient, [])

    def __call__(self, outputs: Any, targets: list[Target], boxes: int, images: int) -> Tensor:
        """The part's share of the batch's loss.

        Args:
            outputs: of the model, for the images of this part.
            targets: of these images; each has at most as many boxes as there are tokens.
            boxes, images: how many there are in the whole batch.
        """
        found = {"logits": outputs.logits.float(), "pred_boxes": outputs.pred_boxes.float()}
        if not all(torch.isfinite(tensor).all() for tensor in found.values()):
            return sum(tensor.sum() for tensor in found.values()) * float(
                "nan"
            )  # the matcher would stop with a traceback
        here = sum(len(target["boxes"]) for target in targets)
        none = torch.empty(0, dtype=torch.int64)
        # the matcher cannot reshape the costs of no boxes at all
        pairs = self.matcher(found, targets) if here else [(none, none)] * len(targets)
        self.losses.to(found["logits"].device)
        queries = found["logits"].shape[1]
        weights = self._weights(here, queries * len(targets)) / self._weights(boxes, queries * images)
        loss = self.losses.loss_labels(found, targets, pairs, None)["loss_ce"] * weights
        of_boxes = self.losses.loss_boxes(found, targets, pairs, max(boxes, 1))
        loss = loss + self.config.bbox_loss_coefficient * of_boxes["loss_bbox"]
        return loss + self.config.giou_loss_coefficient * of_boxes["loss_giou"]

    def _weights(self, boxes: int, queries: int) -> float:
        return boxes + self.config.eos_coefficient * (queries - boxes)
