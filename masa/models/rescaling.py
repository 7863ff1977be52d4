"""The same function with other numbers: channels rescaled, so that a grid on which weights once lay fits no longer.

A model that was once quantised and written out again is quantised a second time without loss, which says nothing of the
method. Its rescaled twin gives the same logits and has no such grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from masa.errors import MasaError
from masa.sharing.projections import family_of

RANGE = 1.4
"""Channels are multiplied by numbers between its inverse and itself, evenly in the logarithm."""

_NORMS = ("input_layernorm", "qkv"), ("post_attention_layernorm", "gu")


@torch.no_grad()
def rescale(model: nn.Module, seed: int) -> nn.Module:
    """Rescale the channels between norms and projections, v and o, and up and down, in place.

    Args:
        model: of Llama's form: two norms with a scale before the projections of a block, a gated FFN, no biases.
        seed: of the factors.

    Raises:
        MasaError: a model of another form.
    """
    family, generator = family_of(model), torch.Generator().manual_seed(seed)

    def factors(count: int) -> Tensor:
        return torch.exp((2 * torch.rand(count, generator=generator) - 1) * math.log(RANGE))

    for layer, block in enumerate(family.blocks):
        linears = {p: family.at(layer, p) for p in "qkvogud" if p in family.paths and layer in family.layers(p)}
        if set(linears) != set("qkvogud") or any(getattr(m, "bias", None) is not None for m in linears.values()):
            raise MasaError(f"{family.name} cannot be rescaled: it has no gated FFN, or biases.")
        for name, letters in _NORMS:
            if not isinstance(scale := getattr(getattr(block, name, None), "weight", None), nn.Parameter):
                raise MasaError(f"{family.name} cannot be rescaled: its blocks have no {name}.")
            by = factors(len(scale))
            scale.mul_(by)
            for p in letters:
                linears[p].weight.div_(by)
        v, o = linears["v"].weight, linears["o"].weight
        by, head = factors(len(v)), model.config.head_dim
        v.mul_(by[:, None])
        groups = by.view(-1, 1, head).expand(-1, o.shape[1] // len(v), -1)  # query heads of a key/value head
        o.div_(groups.reshape(-1))
        by = factors(len(linears["u"].weight))
        linears["u"].weight.mul_(by[:, None])
        linears["d"].weight.div_(by)
    return model
