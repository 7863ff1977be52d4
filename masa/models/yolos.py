"""A detector's run as plain data: sizes and recipe of YOLOS, checked before anything is loaded, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from masa.errors import MasaError
from masa.models import vit
from masa.settings import Positive, key

FAMILY = "yolos"
"""The value of ``model.family`` in a run spec that asks for a detector."""


class Model(vit.Patches):
    """Sizes of a detector; the last four keys are transformers' own names. YOLOS-Ti has no position embeddings between
    layers."""

    family: Literal["yolos"] = key("vit or yolos.", FAMILY)
    num_detection_tokens: Positive = key("Boxes of an image at most.")
    use_mid_position_embeddings: bool = key("Position embeddings between layers.", False)
    hidden_dropout_prob: vit.Rate = key("Dropout.", 0.0)
    attention_probs_dropout_prob: vit.Rate = key("Dropout of attention weights.", 0.0)
    initializer_range: float = key(
        "Standard deviation of new matrices, which suits widths of hundreds: a model of width 48 learned drawn shapes "
        "faster with 0.12.",
        0.02,
        gt=0,
        le=1,
    )


def resolve(model: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes with every default filled in.

    Raises:
        MasaError: a key that is missing or unknown, or sizes that do not fit each other.
    """
    full = vit.check_sizes("A detector's model", model, Model)
    if full["channels"] != 3:
        raise MasaError(f"model.channels = {full['channels']}; a detector reads RGB images, which have 3.")
    return full


# --------------------------------------------------------------------------------------------------------- recipe

WITHOUT = ("label_smoothing", "augmentation", "mixup", "ema_decay")
"""Keys of a classifier's recipe that a detector's has not."""

Recipe = vit.Recipe.changed(
    "Recipe",
    without=WITHOUT,
    warmup_fraction=0.0,
    weight_decay=1e-4,
    max_grad_norm=0.1,
    horizontal_flip=(bool, key("Detectors: images are mirrored with probability 1/2.", True)),
)
"""Keys of ``training`` and their defaults: those of :class:`masa.models.vit.Recipe`, and where YOLOS' own ``main.py``
(Fang et al. 2021) has others, these: no warmup, ``--weight_decay 1e-4``, ``--clip_max_norm 0.1``, images mirrored. Its
learning rate, 1e-4, fine-tunes a classifier: one that trains from scratch must be given.

How the paper's detector was trained is not known here.
"""


def recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with every default filled in.

    Raises:
        MasaError: a key that is unknown or missing, or a value out of its range.
    """
    return vit.recipe(given, Recipe)


def resolve_run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A run spec with every default filled in and its sharing resolved.

    Args:
        spec: ``run`` (SCALE/EXPERIMENT/seedN), ``seed``, ``model``, ``sharing`` and ``training``.

    Raises:
        MasaError: what cannot be built; the message begins with the run.
    """
    return vit.resolve_with(spec, resolve, recipe, "transformers' YOLOS")
