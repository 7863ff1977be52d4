"""Kinds of models that the workflow trains: what data they read, and which modules train and score them. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from masa.data import box_spec, image_sets
from masa.errors import MasaError, unknown
from masa.models import vit, yolos


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        label: for messages.
        verb: of ``masa``, that trains it.
        data: what it is trained on: the option of that verb and, for vision, the section of the configuration.
        training, evaluation: modules of masa, with ``pretrain`` and ``evaluate``.
        export: module of masa that writes it for others (see :mod:`masa.export`).
        model_type: of its Hugging Face configuration (vision).
        resolve: fills the defaults into a run spec and checks it (vision).
        check: sees that an entry of the configuration's data fits a model (vision).
    """

    label: str
    verb: str
    data: str
    training: str
    evaluation: str
    export: str
    model_type: str | None = None
    resolve: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
    check: Callable[[Mapping[str, Any], Mapping[str, Any]], None] | None = None


LANGUAGE = Kind(
    "a language model",
    "pretrain",
    "tokens",
    "masa.training.language",
    "masa.evaluation.language",
    "masa.export.language",
)
VISION = {
    vit.FAMILY: Kind(
        "a Vision Transformer",
        "train-vit",
        "images",
        "masa.training.images",
        "masa.evaluation.images",
        "masa.export.images",
        "timm_wrapper",
        vit.resolve_run,
        image_sets.check,
    ),
    yolos.FAMILY: Kind(
        "a detector",
        "train-vit",
        "boxes",
        "masa.training.detection",
        "masa.evaluation.detection",
        "masa.export.boxes",
        "yolos",
        yolos.resolve_run,
        box_spec.check,
    ),
}
"""``model.family`` of a run spec -> kind; a language model's spec has no family. A new kind is one entry
here, its modules, and its scores in :mod:`masa.evaluation.metrics`."""


def of(spec: Mapping[str, Any]) -> Kind:
    """The kind that a run spec asks for.

    Raises:
        MasaError: it is no run spec, or names a family that does not exist.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("model"), Mapping):
        raise MasaError("A run spec is a mapping with run, seed, model, sharing and training.")
    family = spec["model"].get("family")
    if family is None:
        return LANGUAGE
    if not isinstance(family, str) or family not in VISION:
        raise unknown("model.family: family", family, VISION)
    return VISION[family]


def of_model(config: Mapping[str, Any]) -> Kind:
    """The kind that a stored model's ``config.json`` tells of, with or without a run."""
    return next((kind for kind in VISION.values() if kind.model_type == config.get("model_type")), LANGUAGE)
