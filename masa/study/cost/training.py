"""One training run: steps, tokens, seconds, memory and disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from masa.study.cost.devices import Device
from masa.study.cost.sizes import Sizes
from masa.study.cost.transformer import Work, forward, optimiser_step, training_bytes, training_pass
from masa.training.compiling import is_compiled

PARALLEL = 0.9
"""Efficiency of several processes on one node (DDP overlaps the sum of gradients with backward), and, squared, of
several nodes."""

IMAGE_SECONDS = 4e-7
"""Seconds of one core to read, crop and flip one pixel of an image with a mild augmentation; three times that with an
automatic one. A rough figure, for pictures of 32 x 32 and 64 x 64."""

ITEM_SECONDS = 2.5e-4
"""Seconds of one core to fetch one image, whatever its size: a run of digits spent 6 s beside its steps on 24,128."""

BESIDE = {"tokens": 1.4, "images": 1.6}
"""What a training takes beside its steps, in start-ups: that itself, the Trainer, held-out data, saving and hashing,
and for images timm and torchvision."""

MATCHING_SECONDS = 2.5e-4
"""Seconds of one core to match one image's boxes with a detector's predictions (Hungarian method in SciPy); rough."""


@dataclass(frozen=True)
class Training:
    """One run.

    Attributes:
        steps: optimiser steps.
        amount, unit: tokens or images that it reads.
        flops: of all, held-out scores included.
        seconds: with start-up, on all devices at once.
        world: devices that it runs on.
        memory: bytes on each device, without what a process needs by itself.
        checkpoint: bytes of one checkpoint; model: of what is kept in the end.
        measured: "eager" or "compiled" where the speed of one device was measured so with a model of these sizes and
            this method, else "".
    """

    steps: int
    amount: float
    unit: str
    flops: float
    seconds: float
    world: int
    memory: float
    checkpoint: float
    model: float
    measured: str = ""


class Reach(NamedTuple):
    """What steps reach on one device.

    Attributes:
        flops: a second.
        measured: in which mode, "" where it is taken from other sizes or another method.
        at_most: of a model smaller than all that were measured, which may be bound by something else.
    """

    flops: float
    measured: str
    at_most: bool = False


Pace = Callable[[float], Reach | None]
"""FLOPs a token -> what is known (:meth:`masa.study.cost.readings.Paces.reached`)."""

MODES = ("eager", "compiled")


def mode_of(recipe: Mapping[str, Any]) -> str:
    """How a language model's steps run on a GPU, one of :data:`MODES`."""
    return MODES[is_compiled(recipe, gpu=True)]


def world_size(recipe: Mapping[str, Any]) -> int:
    """Devices of a run."""
    return int(recipe.get("nodes") or 1) * int(recipe.get("processes_per_node") or 1)


def steps_of(recipe: Mapping[str, Any], images: int | None) -> int:
    """Optimiser steps; a recipe in epochs needs the number of training images."""
    return recipe.get("steps") or max(1, math.ceil((images or 0) * recipe["epochs"] / recipe["batch_size"]))


def step_work(recipe: Mapping[str, Any], sizes: Sizes) -> Work:
    """One optimiser step on one of a run's devices."""
    world, micro = world_size(recipe), recipe["micro_batch_size"]
    passes = max(1, recipe["batch_size"] // (micro * world))
    return training_pass(sizes, micro) * passes + optimiser_step(sizes, world)


def flops_a_unit(recipe: Mapping[str, Any], sizes: Sizes) -> float:
    """FLOPs that training spends on one token, or on one image: forward, backward and making the shared matrices."""
    units = recipe["batch_size"] * (1 if sizes.patch else sizes.tokens)
    return step_work(recipe, sizes).flops * world_size(recipe) / units


def train(
    spec: Mapping[str, Any],
    sizes: Sizes,
    device: Device,
    images: int | None,
    held_out: float,
    pace: Pace = lambda flops: None,
) -> Training:
    """Estimate one run.

    Args:
        spec: resolved.
        images: training images of its data set (vision).
        held_out: sequences or images of one held-out score.
        pace: what is known of language models' steps in bfloat16 on the device.
    """
    recipe = spec["training"]
    world, dtype = world_size(recipe), device.dtype(recipe["dtype"])
    steps, batch = steps_of(recipe, images), recipe["batch_size"]
    step = step_work(recipe, sizes)
    known = pace(flops_a_unit(recipe, sizes)) if dtype == "bfloat16" and not sizes.patch else None
    a_step = step.seconds(device, dtype, recipe["threads"])
    if known:
        a_step = max(step.flops / known.flops, a_step if known.at_most else 0.0)
    scoring = forward(sizes, 1) * held_out * min(recipe["evaluations"], steps)
    scoring = Work(scoring.flops, scoring.elements, scoring.scores, scoring.launches / 16)  # in batches
    threads = recipe["threads"]
    efficiency = 1.0 if world == 1 else PARALLEL if (recipe.get("nodes") or 1) == 1 else PARALLEL**2
    seconds = steps * a_step / efficiency
    seconds += scoring.seconds(device, "float32" if not device.gpu else dtype, threads)
    seconds += steps * batch / world * _reading(spec, device)
    unit = "images" if sizes.patch else "tokens"
    seconds += BESIDE[unit] * device.startup_seconds
    saves = seconds / 60 / recipe["checkpoint_minutes"]
    checkpoint = 12.0 * sizes.parameters
    seconds += math.floor(saves) * checkpoint / 3e8  # written and hashed
    return Training(
        steps=steps,
        amount=steps * batch * (1 if sizes.patch else sizes.tokens),
        unit=unit,
        flops=steps * step.flops * world + scoring.flops,
        seconds=seconds,
        world=world,
        memory=training_bytes(sizes, recipe["micro_batch_size"], dtype),
        checkpoint=checkpoint,
        model=4.0 * sizes.stored,
        measured=known.measured if known else "",
    )


def _reading(spec: Mapping[str, Any], device: Device) -> float:
    """Seconds a step waits for each image: all of it in the same process, what workers cannot hide otherwise."""
    model, recipe = spec["model"], spec["training"]
    if "image_size" not in model:
        return 0.0
    pixels = model["image_size"] ** 2
    augmentation = recipe.get("augmentation")
    seconds = ITEM_SECONDS
    if augmentation:
        seconds += IMAGE_SECONDS * pixels * (3 if augmentation.get("auto_augment") else 1)
    if model["family"] == "yolos":
        seconds += 1e-8 * pixels * 3
    workers = recipe.get("workers") or 0
    if workers:
        seconds = seconds / workers if device.gpu else seconds  # on a CPU workers take the model's cores
    return seconds + (MATCHING_SECONDS if model["family"] == "yolos" else 0.0)
