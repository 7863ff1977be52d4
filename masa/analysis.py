"""What trained weights look like, as small JSON: effective ranks, spectra and coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from masa.projections import SharedProjections, blocks, decoder, family_of
from masa.spec import ATTENTION
from masa.weight_sources import Atoms


def effective_rank(weight: Tensor) -> float:
    """exp of the entropy of the normalised singular values of a matrix (Roy and Vetterli 2007)."""
    values = torch.linalg.svdvals(weight.float())
    p = values / values.sum()
    return float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))


@torch.no_grad()
def describe_weights(model: nn.Module) -> dict[str, Any]:
    """Effective rank of every attention matrix, mean |cos| between layers, and MASA's coefficients.

    Returns:
        ``effective_rank``: projection -> L numbers; ``similarity``: projection -> mean absolute cosine between the
        matrices of different layers; ``coefficients``: projection -> (L, S) lists, for MASA.
    """
    family = family_of(model)
    ranks, similarity = {}, {}
    for letter in ATTENTION:
        weights = [family.projection(block, letter).weight for block in blocks(model)]
        ranks[letter] = [round(effective_rank(w), 4) for w in weights]
        flat = nn.functional.normalize(torch.stack([w.flatten().float() for w in weights]), dim=1)
        cosines = (flat @ flat.T).abs()
        count = len(weights)
        similarity[letter] = float((cosines.sum() - cosines.trace()) / max(count * (count - 1), 1))
    coefficients = {}
    shared = getattr(decoder(model), "shared", None)
    if isinstance(shared, SharedProjections):
        for source in shared.values():
            if isinstance(source, Atoms):
                coefficients |= {p: source.coefficients(p).tolist() for p in source.projections}
    return {"effective_rank": ranks, "similarity": similarity, "coefficients": coefficients}
