"""A detector's run as plain data: sizes and recipe of YOLOS, checked before anything is loaded, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from masa.errors import MasaError, unknown
from masa.models import vit

FAMILY = "yolos"
"""The value of ``model.family`` in a run spec that asks for a detector."""

REQUIRED = (*vit.REQUIRED, "num_detection_tokens")
OPTIONAL = {
    "family": FAMILY,
    "use_mid_position_embeddings": False,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.02,
}
"""Further keys and their defaults, by transformers' own names. YOLOS-Ti has no position embeddings between layers;
``initializer_range``, the standard deviation of new matrices, suits widths of hundreds: a model of width 48 learned
drawn shapes faster with 0.12."""


def resolve(model: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes with every default filled in.

    Raises:
        MasaError: a key that is missing or unknown, or sizes that do not fit each other.
    """
    full = vit.check_sizes("A detector's model", model, REQUIRED, OPTIONAL)
    if full["family"] != FAMILY:
        raise unknown("model.family: family", full["family"], [FAMILY])
    if full["channels"] != 3:
        raise MasaError(f"model.channels = {full['channels']}; a detector reads RGB images, which have 3.")
    if not isinstance(full["use_mid_position_embeddings"], bool):
        raise MasaError(
            f"model.use_mid_position_embeddings is true or false, got {full['use_mid_position_embeddings']!r}."
        )
    if isinstance(full["initializer_range"], bool) or not isinstance(full["initializer_range"], int | float):
        raise MasaError(f"model.initializer_range must be a number, got {full['initializer_range']!r}.")
    if not 0 < full["initializer_range"] <= 1:
        raise MasaError(f"model.initializer_range = {full['initializer_range']} must be more than 0 and at most 1.")
    vit.check_rates(full, ("hidden_dropout_prob", "attention_probs_dropout_prob"))
    return full


# --------------------------------------------------------------------------------------------------------- recipe

WITHOUT = ("label_smoothing", "augmentation", "mixup", "ema_decay")
"""Keys of a classifier's recipe that a detector's has not."""

RECIPE: dict[str, Any] = {k: v for k, v in vit.RECIPE.items() if k not in WITHOUT} | {
    "warmup_fraction": 0.0,
    "weight_decay": 1e-4,
    "max_grad_norm": 0.1,
    "horizontal_flip": True,
}
"""Keys of ``training`` and their defaults: those of :data:`masa.models.vit.RECIPE`, and where YOLOS' own ``main.py``
(Fang et al. 2021) has others, these: no warmup, ``--weight_decay 1e-4``, ``--clip_max_norm 0.1``, images mirrored with
probability 1/2. Its learning rate, 1e-4, fine-tunes a classifier: one that trains from scratch must be given.

How the paper's detector was trained is not known here.
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
    if not isinstance(full["horizontal_flip"], bool):
        raise MasaError(f"training.horizontal_flip is true or false, got {full['horizontal_flip']!r}.")
    checked = vit.recipe({key: value for key, value in full.items() if key in vit.RECIPE})
    return {key: checked.get(key, full[key]) for key in RECIPE}


def resolve_run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A run spec with every default filled in and its sharing resolved.

    Args:
        spec: ``run`` (SCALE/EXPERIMENT/seedN), ``seed``, ``model``, ``sharing`` and ``training``.

    Raises:
        MasaError: what cannot be built; the message begins with the run.
    """
    return vit.resolve_with(spec, resolve, recipe, "transformers' YOLOS")
