"""Training of detectors: the same recipe and the same images for every method (loop: :mod:`masa.training.trainer`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masa.data.boxed_images import BoxSplit, TrainingBoxes, check_fits, collate, read_manifest
from masa.data.pixels import data_digest, with_steps
from masa.evaluation.detections import detect
from masa.models import detector, yolos
from masa.runs import run
from masa.runs.fingerprint import fingerprint
from masa.training import trainer
from masa.training.peak import Peak
from masa.training.watch import Trainer


def pretrain(spec: Mapping[str, Any], boxes: Path, out: Path, peak: Peak | None = None, **how: Any) -> dict[str, Any]:
    """Train one detector from scratch, or go on with a run that was interrupted.

    Args:
        spec: see :func:`masa.models.yolos.resolve_run`.
        boxes: box directory (:func:`masa.data.boxes.prepare`).
        out: run directory.
        peak: what the progress lines say that speed is a share of.
        **how: ``wait``, ``restart`` and ``extend`` of :func:`masa.training.trainer.train`.

    Returns:
        The manifest.

    Raises:
        MasaError: a spec that cannot be built, boxes that do not fit it, and what
            :func:`masa.training.trainer.train` raises.
    """
    manifest = read_manifest(boxes)
    spec = with_steps(yolos.resolve_run(spec), manifest)
    recipe, seed = spec["training"], spec["seed"]
    trainer.set_up(spec)
    check_fits(manifest, spec["model"], boxes)
    training, validation = BoxSplit(boxes, "train"), BoxSplit(boxes, "validation")

    def build() -> nn.Module:
        model = detector.build(spec["model"], spec["sharing"], manifest["classes"])
        model.base_model.no_weight_decay = lambda: set(detector.tokens(model))  # for parameter_groups
        return model

    def score(model: nn.Module) -> dict[str, float]:
        found = detect(model, validation)
        precision = float(found.mean_average_precision()["map"])
        return {"validation_loss": found.loss} | ({"validation_map": precision} if precision >= 0 else {})

    data = data_digest(manifest)
    code = fingerprint("masa.training.detection")
    task = trainer.Task(
        build=build,
        data=TrainingBoxes(training, recipe["steps"] * recipe["batch_size"], seed, recipe["horizontal_flip"]),
        score=score,
        unit="images",
        units_per_step=recipe["batch_size"],
        inputs={"boxes": data},
        code=code,
        identity=run.digest([spec, data, code]),
        trainer=DetectionTrainer,
        collate=collate,
        packages=detector.PACKAGES,
        casts_once=False,
        peak=peak,
    )
    return trainer.train(spec, task, out, **how)


class DetectionTrainer(Trainer):
    """YOLOS' loss of the whole batch, whatever the number of micro-batches and processes that it is cut into."""

    loss_is_scaled_for_ga = True  # parts of a batch sum up to its loss

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.criterion = detector.Criterion(self.model.config)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Numbers of boxes and images of the whole batch, (2,), in all micro-batches and processes."""
        targets = [target for batch in batch_samples for target in batch["labels"]]
        counts = torch.tensor([sum(len(target["boxes"]) for target in targets), len(targets)], device=device)
        return self.accelerator.gather(counts[None]).sum(0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
        **_: Any,
    ) -> Tensor | tuple[Tensor, Any]:
        outputs = model(pixel_values=inputs["pixel_values"])
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        counts = [int(n) for n in num_items_in_batch]
        # processes average their gradients, which are shares of one batch here
        loss = self.criterion(outputs, inputs["labels"], *counts) * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss
