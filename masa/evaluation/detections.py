"""What a detector finds in images, and its scores: COCO's mean average precisions, computed by pycocotools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from masa.data.boxed_images import BoxSplit
from masa.models.detector import Criterion

BATCH = 64
THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
RECALLS = np.linspace(0, 1, 101).tolist()
"""COCO's own, in double precision: torchmetrics' are single, and a recall of exactly 1/10 would miss the point 0.1."""

SCORES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")


@dataclass(frozen=True)
class Detections:
    """What the tokens of a detector found in the first N images of a split.

    Attributes:
        boxes: (N, T, 4) float64, (x, y, width, height) in pixels of the original image.
        scores: (N, T) probability of the likeliest class that is not "no object".
        labels: (N, T) that class.
        loss: of all N images as one batch.
    """

    split: BoxSplit
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    loss: float

    def mean_average_precision(self, class_metrics: bool = False) -> dict[str, Any]:
        """torchmetrics' result for COCO's thresholds; crowds are matched with any number of boxes and not counted."""
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(
            box_format="xywh",
            iou_thresholds=THRESHOLDS,
            rec_thresholds=RECALLS,
            class_metrics=class_metrics,
            backend="pycocotools",
        )
        metric.warn_on_many_detections = False
        for i in range(len(self.boxes)):
            truth = self.split.boxes(i)
            found = {"boxes": self.boxes[i], "scores": self.scores[i], "labels": self.labels[i]}
            metric.update(
                [found],
                [
                    {
                        "boxes": torch.from_numpy(truth["xywh"].copy()),
                        "labels": torch.from_numpy(truth["label"].astype(np.int64)),
                        "iscrowd": torch.from_numpy(truth["crowd"].astype(np.int64)),
                        "area": torch.from_numpy(truth["area"].copy()),
                    }
                ],
            )
        return metric.compute()

    def scores_of(self, classes: int) -> dict[str, Any]:
        """Everything that a table or figure needs.

        Returns:
            :data:`SCORES` and ``per_class`` (map of each class), None where the split has no such box; ``images``,
            ``boxes`` (without crowds) and ``loss``.
        """
        result = self.mean_average_precision(class_metrics=True)
        of_class = zip(result["classes"].reshape(-1).tolist(), result["map_per_class"].reshape(-1), strict=True)
        per_class = {label: _number(value) for label, value in of_class}
        truth = [self.split.boxes(i) for i in range(len(self.boxes))]
        return {
            **{name: _number(result[name]) for name in SCORES},
            "per_class": [per_class.get(label) for label in range(classes)],
            "images": len(self.boxes),
            "boxes": int(sum((boxes["crowd"] == 0).sum() for boxes in truth)),
            "loss": self.loss,
        }


def _number(value: Tensor) -> float | None:
    """COCO says -1 where there is nothing to find."""
    return None if value < 0 else float(value)


@torch.no_grad()
def detect(model: nn.Module, split: BoxSplit, batch_size: int = BATCH, limit: int | None = None) -> Detections:
    """Run a detector over a split, unmirrored.

    Args:
        model: a ``YolosForObjectDetection``; its training mode is restored.
        split, limit: the images, or the first of them.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    count = min(limit or len(split), len(split))
    criterion, total = Criterion(model.config), _boxes_of(split, count)
    boxes, scores, labels, loss, first = [], [], [], 0.0, 0
    for x, targets in split.batches(batch_size, count):
        outputs = model(pixel_values=x.to(device))
        targets = [{key: value.to(device) for key, value in target.items()} for target in targets]
        loss += float(criterion(outputs, targets, total, count))
        best, label = outputs.logits.float().softmax(-1)[..., :-1].max(-1)
        sizes = np.stack([split.size(i) for i in range(first, first + len(x))])
        boxes.append(to_pixels(outputs.pred_boxes, torch.from_numpy(sizes)))
        scores.append(best.cpu())
        labels.append(label.cpu())
        first += len(x)
    model.train(was_training)
    return Detections(split, torch.cat(boxes), torch.cat(scores), torch.cat(labels), loss)


def to_pixels(boxes: Tensor, sizes: Tensor) -> Tensor:
    """(B, T, 4) centres and sizes as parts of images of (width, height) (B, 2) -> (x, y, width, height) in pixels."""
    center, extent = boxes.double().cpu().split(2, dim=-1)
    return torch.cat([center - extent / 2, extent], -1) * sizes.double().repeat(1, 2)[:, None]


def _boxes_of(split: BoxSplit, count: int) -> int:
    return sum(int((split.boxes(i)["crowd"] == 0).sum()) for i in range(count))
