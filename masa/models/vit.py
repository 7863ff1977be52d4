"""A Vision Transformer's run as plain data: sizes and recipe, checked before anything is loaded, without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from masa.errors import MasaError, unknown
from masa.sharing.spec import METHODS, ModelShape, SharingSpec

FAMILY = "vit"
"""The value of ``model.family`` in a run spec that asks for a Vision Transformer; language models have none."""

REQUIRED = (
    "image_size",
    "patch_size",
    "channels",
    "num_classes",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
)
OPTIONAL = {"family": FAMILY, "drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.0, "global_pool": "token"}
"""Further keys and their defaults; the last four are timm's own names."""

POOLS = ("token", "avg")


def resolve(model: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes with every default filled in.

    Raises:
        MasaError: a key that is missing or unknown, or sizes that do not fit each other.
    """
    full = check_sizes("A Vision Transformer's model", model, REQUIRED, OPTIONAL)
    if full["channels"] not in (1, 3):
        raise MasaError(f"model.channels = {full['channels']}; images have 1 (grey) or 3 (RGB).")
    if full["num_classes"] < 2:
        raise MasaError("model.num_classes must be at least 2.")
    if full["global_pool"] not in POOLS:
        raise unknown("model.global_pool: pooling", full["global_pool"], POOLS)
    check_rates(full, ("drop_rate", "attn_drop_rate", "drop_path_rate"))
    return full


def check_sizes(
    what: str, model: Mapping[str, Any], required: Sequence[str], optional: Mapping[str, Any]
) -> dict[str, Any]:
    """Sizes of a model that cuts images into patches, with every default filled in.

    Args:
        what: the model, for messages.
        model: as given.
        required: keys that must be there, all of them whole numbers.
        optional: further keys and their defaults.

    Raises:
        MasaError: a key that is missing or unknown, or sizes that do not fit each other.
    """
    for key in model:
        if key not in (*required, *optional):
            raise unknown(f"{what}: key", key, (*required, *optional))
    if missing := [key for key in required if key not in model]:
        raise MasaError(f"{what} needs {', '.join(missing)}.")
    for key in required:
        if isinstance(model[key], bool) or not isinstance(model[key], int) or model[key] < 1:
            raise MasaError(f"model.{key} must be an integer of at least 1, got {model[key]!r}.")
    full = {**optional, **model}
    size, patch = full["image_size"], full["patch_size"]
    if size % patch:
        fits = [p for p in range(1, size + 1) if size % p == 0]
        raise MasaError(f"model.patch_size = {patch} does not divide image_size = {size}. Choose one of {fits}.")
    width, heads = full["hidden_size"], full["num_attention_heads"]
    if width % heads:
        raise MasaError(f"model.num_attention_heads = {heads} does not divide hidden_size = {width}.")
    return full


def check_rates(model: Mapping[str, Any], keys: Sequence[str]) -> None:
    """See that dropout rates are some.

    Raises:
        MasaError: one is not.
    """
    for key in keys:
        if isinstance(model[key], bool) or not isinstance(model[key], int | float) or not 0 <= model[key] < 1:
            raise MasaError(f"model.{key} = {model[key]!r} must be at least 0 and less than 1.")


# --------------------------------------------------------------------------------------------------------- recipe

RECIPE: dict[str, Any] = {
    "epochs": None,
    "steps": None,
    "batch_size": None,
    "micro_batch_size": None,
    "learning_rate": None,
    "min_learning_rate_ratio": 0.0,
    "warmup_fraction": 0.1,
    "weight_decay": 0.05,
    "adam_betas": [0.9, 0.999],
    "max_grad_norm": 1.0,
    "coefficients_learning_rate_ratio": 1.0,
    "dtype": "auto",
    "evaluations": 10,
    "checkpoint_minutes": 5,
    "threads": 1,
    "nodes": 1,
    "processes_per_node": 1,
    "parallel": "ddp",
    "workers": 0,
    "label_smoothing": 0.1,
    "augmentation": None,
    "mixup": None,
    "ema_decay": None,
}
"""Keys of ``training`` and their defaults, DeiT's (Touvron et al. 2021) where it has one. The paper's text gives none.

``epochs`` or ``steps`` must be given, and ``batch_size`` and ``learning_rate``. ``augmentation`` holds arguments of
``timm.data.create_transform`` by their own names (timm's defaults for the others; None: no augmentation), ``mixup``
those of ``timm.data.Mixup`` (None: none), ``workers`` the number of processes that read images.
"""


def recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with every default filled in.

    Raises:
        MasaError: a key that is unknown or missing, or a value out of its range.
    """
    for key in given:
        if key not in RECIPE:
            raise unknown("training: key", key, RECIPE)
    full = RECIPE | dict(given)
    if (full["epochs"] is None) == (full["steps"] is None):
        raise MasaError("training needs either epochs or steps.")
    for key in ("batch_size", "learning_rate"):
        if full[key] is None:
            raise MasaError(f"training needs {key}.")
    full["micro_batch_size"] = full["micro_batch_size"] or full["batch_size"]
    for key, low, high in (
        ("epochs", 0, math.inf),
        ("steps", 0, math.inf),
        ("batch_size", 0, math.inf),
        ("learning_rate", 0, math.inf),
        ("ema_decay", 0, 1),
    ):
        if full[key] is not None and not low < full[key] < high:
            raise MasaError(f"training.{key} = {full[key]!r} must be more than {low} and less than {high}.")
    for key in ("label_smoothing", "warmup_fraction", "min_learning_rate_ratio"):
        if not 0 <= full[key] < 1:
            raise MasaError(f"training.{key} = {full[key]!r} must be at least 0 and less than 1.")
    if full["batch_size"] % full["micro_batch_size"]:
        raise MasaError(
            f"training.micro_batch_size = {full['micro_batch_size']} does not divide batch_size = {full['batch_size']}."
        )
    if full["mixup"] is not None and full["micro_batch_size"] % 2:
        raise MasaError(f"training.mixup pairs images: micro_batch_size = {full['micro_batch_size']} must be even.")
    return full


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
