"""A Vision Transformer's run as plain data: sizes and recipe, checked before anything is loaded, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from masa.errors import MasaError
from masa.models.recipes import Optimizer, without_later
from masa.settings import Amount, Positive, Section, Share, key
from masa.sharing.spec import METHODS, ModelShape, SharingSpec

FAMILY = "vit"
"""The value of ``model.family`` in a run spec that asks for a Vision Transformer; language models have none."""


class Patches(Section):
    """Sizes of a model that cuts images into patches."""

    image_size: Positive = key("Pixels of a side.")
    patch_size: Positive = key("Pixels of a patch's side; divides image_size.")
    channels: Positive = key("1 (grey) or 3 (RGB).")
    num_classes: Positive = key("Classes.")
    num_layers: Positive = key("L.")
    hidden_size: Positive = key("d.")
    num_attention_heads: Positive = key("H; divides d.")
    intermediate_size: Positive = key("Width of the FFN.")


Rate = Annotated[float, Field(ge=0, lt=1)]


class Model(Patches):
    """Sizes of a Vision Transformer; the last four keys are timm's own names."""

    family: Literal["vit"] = key("vit or yolos.", FAMILY)
    drop_rate: Rate = key("Dropout before the classifier.", 0.0)
    attn_drop_rate: Rate = key("Dropout of attention weights.", 0.0)
    drop_path_rate: Rate = key("Stochastic depth.", 0.0)
    global_pool: Literal["token", "avg"] = key("What the classifier reads: the class token or the average.", "token")


def resolve(model: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes with every default filled in.

    Raises:
        MasaError: a key that is missing or unknown, or sizes that do not fit each other.
    """
    full = check_sizes("A Vision Transformer's model", model, Model)
    if full["channels"] not in (1, 3):
        raise MasaError(f"model.channels = {full['channels']}; images have 1 (grey) or 3 (RGB).")
    if full["num_classes"] < 2:
        raise MasaError("model.num_classes must be at least 2.")
    return full


def check_sizes(what: str, model: Mapping[str, Any], section: type[Patches]) -> dict[str, Any]:
    """Sizes of a model that cuts images into patches, with every default filled in.

    Args:
        what: the model, for messages.
        model: as given.
        section: its keys.

    Raises:
        MasaError: a key that is missing or unknown, or sizes that do not fit each other.
    """
    full = section.filled(model, "model", what)
    size, patch = full["image_size"], full["patch_size"]
    if size % patch:
        fits = [p for p in range(1, size + 1) if size % p == 0]
        raise MasaError(f"model.patch_size = {patch} does not divide image_size = {size}. Choose one of {fits}.")
    width, heads = full["hidden_size"], full["num_attention_heads"]
    if width % heads:
        raise MasaError(f"model.num_attention_heads = {heads} does not divide hidden_size = {width}.")
    return full


# --------------------------------------------------------------------------------------------------------- recipe


class Recipe(Section):
    """How a Vision Transformer is trained; defaults are DeiT's (Touvron et al. 2021) where it has one. The paper's text
    gives none."""

    epochs: Annotated[float, Field(gt=0)] | None = key("Passes over the training images; either this or steps.", None)
    steps: Positive | None = key("Optimiser steps; either this or epochs.", None)
    batch_size: Positive = key("Images an optimiser step, over all devices.")
    micro_batch_size: Positive | None = key("Images a device and pass (gradient accumulation). null: batch_size.", None)
    learning_rate: float = key("Peak learning rate, the same for every method at one scale.", gt=0)
    min_learning_rate_ratio: Rate = key("Final learning rate as a fraction of the peak.", 0.0)
    warmup_fraction: Rate = key("Linear warmup over this fraction of the steps, then cosine (detectors: 0).", 0.1)
    weight_decay: Amount = key("AdamW weight decay of matrices (DeiT's; detectors: YOLOS', 1e-4).", 0.05)
    optimizer: Optimizer = key("As training.optimizer.", "adamw")
    adam_betas: list[float] = key("AdamW betas.", [0.9, 0.999], min_length=2, max_length=2)
    max_grad_norm: float = key("Gradients are clipped to this norm (detectors: 0.1).", 1.0, gt=0)
    coefficients_learning_rate_ratio: float = key(
        "Learning rate of MASA's coefficients relative to all other parameters.", 1.0, gt=0
    )
    dtype: Literal["auto", "float32", "bfloat16"] = key("As training.dtype.", "auto")
    evaluations: Positive = key("How many times the validation images are scored.", 10)
    checkpoint_minutes: float = key("Minutes between checkpoints.", 5, gt=0)
    threads: Positive = key("CPU threads of one process of a training.", 1)
    nodes: Positive = key("As training.nodes.", 1)
    processes_per_node: Positive = key("As training.processes_per_node.", 1)
    parallel: Literal["ddp", "fsdp"] = key("As training.parallel.", "ddp")
    compile: Literal["auto"] | bool = key("As training.compile.", "auto")
    workers: int = key("Processes that read and augment images; 0: the training's own.", 0, ge=0)
    label_smoothing: Rate = key("Label smoothing.", 0.1)
    augmentation: dict[str, Any] | None = key(
        "Arguments of timm.data.create_transform by their own names; null: none.", None
    )
    mixup: dict[str, Any] | None = key(
        "Arguments of timm.data.Mixup by their own names (mixup_alpha, cutmix_alpha, …); null: none.", None
    )
    ema_decay: Share | None = key(
        "Decay of an average of the weights, which is then the model that is kept; null: none.", None
    )


def recipe(given: Mapping[str, Any], section: type[Section] = Recipe) -> dict[str, Any]:
    """The recipe with every default filled in.

    Raises:
        MasaError: a key that is unknown or missing, a value out of its range, or values that do not fit each other.
    """
    full = section.filled(given, "training", "training")
    if (full["epochs"] is None) == (full["steps"] is None):
        raise MasaError("training needs either epochs or steps.")
    full["micro_batch_size"] = full["micro_batch_size"] or full["batch_size"]
    if full["batch_size"] % full["micro_batch_size"]:
        raise MasaError(
            f"training.micro_batch_size = {full['micro_batch_size']} does not divide batch_size = {full['batch_size']}."
        )
    if full.get("mixup") is not None and full["micro_batch_size"] % 2:
        raise MasaError(f"training.mixup pairs images: micro_batch_size = {full['micro_batch_size']} must be even.")
    return without_later(full)


def resolve_run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A run spec with every default filled in and its sharing resolved.

    Args:
        spec: ``run`` (SCALE/EXPERIMENT/seedN), ``seed``, ``model``, ``sharing`` and ``training``.

    Raises:
        MasaError: what cannot be built; the message begins with the run.
    """
    return resolve_with(spec, resolve, recipe, "timm's VisionTransformer, which fuses q, k and v in equal parts")


def resolve_with(
    spec: Mapping[str, Any],
    resolve: Callable[[Mapping[str, Any]], dict[str, Any]],
    recipe: Callable[[Mapping[str, Any]], dict[str, Any]],
    where: str,
) -> dict[str, Any]:
    """A run spec of one kind of model, with its ``resolve`` and ``recipe``; heads cannot be grouped in any.

    Args:
        where: the model, for the message that says so.
    """
    try:
        wanted = SharingSpec.coerce(spec["sharing"])
        if METHODS[wanted.method].source == "grouped_heads":
            raise MasaError(f"grouped-query attention does not exist in {where}. Choose another method.")
        model = resolve(spec["model"])
        return {
            "run": spec["run"],
            "seed": spec["seed"],
            "model": model,
            "sharing": wanted.resolve(ModelShape.of_sizes(model)).to_dict(),
            "training": recipe(spec["training"]),
        }
    except KeyError as error:
        raise MasaError(f"A run spec needs {error}.") from error
    except MasaError as error:
        raise MasaError(f"Run {spec.get('run')}: {error}") from error
