"""Sizes of a Vision Transformer as plain data: checked, and turned into shapes, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from masa.errors import MasaError, unknown
from masa.spec import ModelShape

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


def is_vit(spec: Mapping[str, Any]) -> bool:
    """Whether a run spec asks for a Vision Transformer."""
    family = spec["model"].get("family")
    if family not in (None, FAMILY):
        raise unknown("model.family: family", family, [FAMILY])
    return family == FAMILY


def resolve(model: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes with every default filled in.

    Raises:
        MasaError: a key that is missing or unknown, or sizes that do not fit each other.
    """
    for key in model:
        if key not in (*REQUIRED, *OPTIONAL):
            raise unknown("A Vision Transformer's model: key", key, (*REQUIRED, *OPTIONAL))
    if missing := [key for key in REQUIRED if key not in model]:
        raise MasaError(f"A Vision Transformer's model needs {', '.join(missing)}.")
    for key in REQUIRED:
        if isinstance(model[key], bool) or not isinstance(model[key], int) or model[key] < 1:
            raise MasaError(f"model.{key} must be an integer of at least 1, got {model[key]!r}.")
    full = OPTIONAL | dict(model)
    size, patch = full["image_size"], full["patch_size"]
    if size % patch:
        fits = [p for p in range(1, size + 1) if size % p == 0]
        raise MasaError(f"model.patch_size = {patch} does not divide image_size = {size}. Choose one of {fits}.")
    width, heads = full["hidden_size"], full["num_attention_heads"]
    if width % heads:
        raise MasaError(f"model.num_attention_heads = {heads} does not divide hidden_size = {width}.")
    if full["channels"] not in (1, 3):
        raise MasaError(f"model.channels = {full['channels']}; images have 1 (grey) or 3 (RGB).")
    if full["num_classes"] < 2:
        raise MasaError("model.num_classes must be at least 2.")
    if full["global_pool"] not in POOLS:
        raise unknown("model.global_pool: pooling", full["global_pool"], POOLS)
    for key in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
        if not 0 <= full[key] < 1:
            raise MasaError(f"model.{key} = {full[key]!r} must be at least 0 and less than 1.")
    return full


def shape(model: Mapping[str, Any]) -> ModelShape:
    """Shapes of its projections, for :meth:`masa.SharingSpec.resolve`."""
    full = resolve(model)
    d, heads, ffn = full["hidden_size"], full["num_attention_heads"], full["intermediate_size"]
    shapes = dict.fromkeys("qkvo", (d, d)) | {"u": (ffn, d), "d": (d, ffn)}
    return ModelShape(full["num_layers"], d, heads, heads, shapes)
