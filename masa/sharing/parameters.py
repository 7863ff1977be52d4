"""What an optimiser is handed: which parameters decay, and which are MASA's coefficients; and their dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from masa.sharing.families import layer_at
from masa.sharing.projections import SharedProjections, bank_of, blocks, decoder, family_of, is_plain


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` itself, its parameters of another dtype; ``model.to(dtype)`` would round RoPE's frequencies, too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def parameter_groups(model: nn.Module, recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """AdamW groups: matrices and token embeddings decay; norms, biases and MASA's coefficients do not.

    Neither do parameters that the model itself exempts, as timm's do (class token and position embedding).
    Coefficients (with their block embeddings and MLPs) have their own learning rate.

    Args:
        model: shared or plain.
        recipe: ``learning_rate``, ``weight_decay`` and ``coefficients_learning_rate_ratio``.
    """
    exempting = getattr(decoder(model), "no_weight_decay", set)()
    exempt = {id(p) for name, p in decoder(model).named_parameters() if name in exempting}
    coefficients = coefficient_parameters(model)
    special = {id(p) for p in coefficients}
    plain = [p for p in model.parameters() if p.requires_grad and id(p) not in special]
    rate = recipe["learning_rate"]
    groups = [
        {
            "params": [p for p in plain if id(p) not in exempt and p.ndim >= 2],
            "weight_decay": recipe["weight_decay"],
            "lr": rate,
        },
        {"params": [p for p in plain if id(p) in exempt or p.ndim < 2], "weight_decay": 0.0, "lr": rate},
        {"params": coefficients, "weight_decay": 0.0, "lr": rate * recipe["coefficients_learning_rate_ratio"]},
    ]
    return [group for group in groups if group["params"]]


def coefficient_parameters(model: nn.Module) -> list[nn.Parameter]:
    """MASA's coefficients, with the block embeddings and MLPs that make them."""
    return [
        p
        for module in model.modules()
        if isinstance(module, SharedProjections)
        for source in module.values()
        for p in source.coefficient_parameters()
    ]


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """The matrices of the blocks, those that the model shares included: neither embeddings, heads nor coefficients.

    Returns:
        Parameter (out, in), or a stack (n, out, in) of some -> how many matrices stand below each other in its rows: 1,
        or 3 where one layer is Q, K and V.
    """
    bank, family = bank_of(model), family_of(model)
    places = [
        (layer_at(block, place.path), place.layout)
        for block, found in zip(family.blocks, family.found, strict=True)
        for place in found.places.values()
        if place.layout and place.layout.stacked
    ]
    rows = {layer.weight: len(layout.letters) for layer, layout in places if is_plain(layer)}
    coefficients = set(coefficient_parameters(model))
    inside = [*blocks(model).parameters(), *(bank.parameters() if bank is not None else ())]
    return {p: rows.get(p, 1) for p in inside if p.ndim in (2, 3) and p not in coefficients}
