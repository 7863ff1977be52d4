"""Predictions of an image classifier and their scores: accuracies, per-class accuracy, confusions, calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from masa.data.pixels import ImageSplit

BATCH = 256
TOP = 5


@dataclass(frozen=True)
class Predictions:
    """Logits (N, classes) float32 and labels (N,) of one split."""

    logits: Tensor
    labels: Tensor

    @property
    def loss(self) -> float:
        """Cross-entropy in nats, without label smoothing."""
        return float(nn.functional.cross_entropy(self.logits.double(), self.labels))

    def accuracy(self, top: int = 1) -> float | None:
        """Fraction of images whose label is among the ``top`` largest logits; None where that is trivial."""
        from torchmetrics.functional.classification import multiclass_accuracy

        classes = self.logits.shape[1]
        if top >= classes:
            return None
        return float(multiclass_accuracy(self.logits, self.labels, classes, average="micro", top_k=top))

    def confusion(self) -> list[list[int]]:
        """(classes, classes) counts: row = label, column = prediction."""
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        return multiclass_confusion_matrix(self.logits, self.labels, self.logits.shape[1]).tolist()

    def scores(self) -> dict[str, Any]:
        """Everything that a table or figure needs.

        Returns:
            ``images``, ``loss``, ``top1`` with its standard error, ``top5``, ``calibration_error`` (expected, 15 bins),
            ``per_class`` (recall of each class, None where it has no image), ``confusion``, and ``correct_by_image``, a
            character an image, "1" where the prediction is right, for paired comparisons.
        """
        from torchmetrics.functional.classification import multiclass_calibration_error

        top1 = self.accuracy() or 0.0
        confusion = self.confusion()
        classes = self.logits.shape[1]
        return {
            "images": len(self.labels),
            "loss": self.loss,
            "top1": top1,
            "top1_stderr": math.sqrt(top1 * (1 - top1) / len(self.labels)),
            "top5": self.accuracy(TOP),
            "calibration_error": float(multiclass_calibration_error(self.logits.softmax(1), self.labels, classes)),
            "per_class": [row[i] / sum(row) if sum(row) else None for i, row in enumerate(confusion)],
            "confusion": confusion,
            "correct_by_image": "".join(str(int(right)) for right in self.logits.argmax(1) == self.labels),
        }


@torch.no_grad()
def predict(model: nn.Module, split: ImageSplit, batch_size: int = BATCH, limit: int | None = None) -> Predictions:
    """Run a classifier over a split, without augmentation.

    Args:
        model: maps ``pixel_values`` (B, channels, H, W) to an output with ``logits``; its training mode is restored.
        split, limit: the images, or the first of them.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits, labels = [], []
    for x, y in split.batches(batch_size, limit):
        logits.append(model(pixel_values=x.to(device)).logits.float().cpu())
        labels.append(y)
    model.train(was_training)
    return Predictions(torch.cat(logits), torch.cat(labels))
