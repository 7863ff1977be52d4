"""Training of Vision Transformers: the same recipe and images for every method (loop: :mod:`masa.training.trainer`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from masa.data.pixels import Collate, ImageSplit, TrainingImages, check_fits, data_digest, read_manifest, with_steps
from masa.evaluation.classification import predict
from masa.models import timm_vit, vit
from masa.runs import run
from masa.runs.fingerprint import fingerprint
from masa.training import trainer
from masa.training.peak import Peak
from masa.training.watch import Trainer


def pretrain(spec: Mapping[str, Any], images: Path, out: Path, peak: Peak | None = None, **how: Any) -> dict[str, Any]:
    """Train one Vision Transformer, or go on with a run that was interrupted.

    Args:
        spec: see :func:`masa.models.vit.resolve_run`.
        images: image directory (:func:`masa.data.images.prepare`).
        out: run directory.
        peak: what the progress lines say that speed is a share of.
        **how: ``wait``, ``restart`` and ``extend`` of :func:`masa.training.trainer.train`.

    Returns:
        The manifest.

    Raises:
        MasaError: a spec that cannot be built, images that do not fit it, and what
            :func:`masa.training.trainer.train` raises.
    """
    manifest = read_manifest(images)
    spec = with_steps(vit.resolve_run(spec), manifest)
    recipe, seed = spec["training"], spec["seed"]
    trainer.set_up(spec)
    check_fits(manifest, spec["model"], images)
    training, validation = ImageSplit(images, "train"), ImageSplit(images, "validation")
    average = Average(recipe["ema_decay"]) if recipe["ema_decay"] else None

    def final(model: nn.Module) -> nn.Module:
        return average.model if average is not None else model

    def score(model: nn.Module) -> dict[str, float]:
        found = predict(final(model), validation)
        top5 = found.accuracy(5)
        scores = {"validation_loss": found.loss, "validation_top1": found.accuracy() or 0.0}
        return scores | ({"validation_top5": top5} if top5 is not None else {})

    data = data_digest(manifest)
    code = fingerprint("masa.training.images")
    task = trainer.Task(
        build=lambda: timm_vit.build(
            spec["model"], spec["sharing"], manifest["classes"], manifest["mean"], manifest["std"]
        ),
        data=TrainingImages(training, recipe["steps"] * recipe["batch_size"], seed, recipe["augmentation"]),
        score=score,
        unit="images",
        units_per_step=recipe["batch_size"],
        inputs={"images": data},
        code=code,
        identity=run.digest([spec, data, code]),
        trainer=partial(ImageTrainer, recipe["label_smoothing"]),
        collate=Collate(seed, spec["model"]["num_classes"], recipe["mixup"]),
        packages=timm_vit.PACKAGES,
        callbacks=[average] if average is not None else [],
        final=final,
        peak=peak,
    )
    return trainer.train(spec, task, out, **how)


class ImageTrainer(Trainer):
    """Cross-entropy with label smoothing, over class numbers (B,) or mixed targets (B, classes)."""

    loss_is_scaled_for_ga = False  # a mean over the micro-batch

    def __init__(self, label_smoothing: float, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.label_smoothing = label_smoothing

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, Any]:
        outputs = model(pixel_values=inputs["pixel_values"])
        logits = outputs.logits.float()
        loss = nn.functional.cross_entropy(logits, inputs["labels"], label_smoothing=self.label_smoothing)
        return (loss, outputs) if return_outputs else loss


class Average(TrainerCallback):
    """Exponential moving average of all parameters (timm's ``ModelEmaV3`` with warmup), kept with every checkpoint.

    Atoms and coefficients are averaged each, so the average is a model of the same sharing. It is scored during
    training and stored in the end.
    """

    FILE = "average.safetensors"

    def __init__(self, decay: float) -> None:
        self.decay = decay

    @property
    def model(self) -> nn.Module:
        return self.ema.module

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        from timm.utils import ModelEmaV3

        self.ema = ModelEmaV3(model, decay=self.decay, use_warmup=True)
        if state.global_step:
            tensors = load_file(Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE)
            self.model.load_state_dict(tensors)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.ema.update(model, step=state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            save_file({name: t.contiguous() for name, t in self.model.state_dict().items()}, folder / self.FILE)
