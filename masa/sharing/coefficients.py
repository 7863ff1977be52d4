"""Where MASA's coefficients C come from while it trains: parameters, an MLP on block embeddings, or a fixed basis.

Dimensions: L layers, S atoms, e width of an embedding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from masa.errors import MasaError


class DirectCoefficients(nn.Module):
    """C (L, S) as a parameter; rows drawn uniformly from the unit sphere."""

    def __init__(self, num_layers: int, atoms: int, **_: Any) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.empty(num_layers, atoms))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.values)
        self.values.copy_(nn.functional.normalize(self.values, dim=1))

    def forward(self) -> Tensor:
        return self.values


class LegendreCoefficients(nn.Module):
    """C (L, S) that is never trained: column s is Legendre's polynomial of degree s over depth, from -1 to 1.

    Made orthogonal on the L layers (by QR of powers, which is Gram and Schmidt's method) and of a size that gives rows
    the norm 1 on average, as those of :class:`DirectCoefficients` have. Atoms alone are learned: the mean over depth,
    its slope, its curvature and so on.
    """

    def __init__(self, num_layers: int, atoms: int, **_: Any) -> None:
        super().__init__()
        self.values = nn.Buffer(torch.empty(num_layers, atoms))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        layers, atoms = self.values.shape
        depth = torch.linspace(-1, 1, layers, dtype=torch.float64) if layers > 1 else torch.zeros(1).double()
        q, r = torch.linalg.qr(torch.stack([depth**degree for degree in range(atoms)], dim=1))
        self.values.copy_(q * r.diagonal().sign() * math.sqrt(layers / atoms))

    def forward(self) -> Tensor:
        return self.values


class BlockEmbedding(nn.Module):
    """E (L, e), one row a block, shared by the coefficient MLPs of all projections and registered on the first."""

    def __init__(self, num_layers: int, dim: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.empty(num_layers, dim))
        self.owned = False

    def forward(self) -> Tensor:
        return self.values


class Affine(nn.Module):
    """``y = x W^T + b``, no ``nn.Linear``: tools that adapt or quantise every one leave C's MLP alone."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        like = nn.Linear(in_features, out_features)
        self.weight, self.bias = like.weight, like.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class MlpCoefficients(nn.Module):
    """C = gain * MLP(E): three linear layers with GELU between, (L, e) -> (L, S).

    A default initialisation gives coefficients of norm 0.1, or the same ones for all layers. Here E ~ N(0, 1), the
    weights keep the variance, the last bias centres the rows over the layers and ``gain`` (L, 1), constant, gives
    every row norm 1 at the start.
    """

    def __init__(self, num_layers: int, atoms: int, embedding_dim: int, embedding: BlockEmbedding) -> None:
        super().__init__()
        self.owns_embedding = not embedding.owned
        if self.owns_embedding:
            embedding.owned = True
            self.embedding = embedding
        else:  # a plain reference: a parameter registered twice could not be saved as safetensors
            object.__setattr__(self, "embedding", embedding)
        self.layers = nn.Sequential(
            Affine(embedding_dim, embedding_dim),
            nn.GELU(),
            Affine(embedding_dim, embedding_dim),
            nn.GELU(),
            Affine(embedding_dim, atoms),
        )
        self.gain = nn.Buffer(torch.ones(num_layers, 1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.owns_embedding:
            nn.init.normal_(self.embedding.values)
        for layer in self.layers:
            if isinstance(layer, Affine):
                nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.weight.shape[1]))
                nn.init.zeros_(layer.bias)
        raw = self.layers(self.embedding.values)
        if len(raw) > 1:
            self.layers[-1].bias.copy_(-raw.mean(0))
        norms = self.layers(self.embedding.values).norm(dim=1, keepdim=True)
        self.gain.copy_(1 / norms.clamp_min(1e-6))

    def forward(self) -> Tensor:
        return self.gain * self.layers(self.embedding())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}values" in state_dict:
            raise MasaError(
                f"{prefix}values holds the coefficients alone: a saved model no longer has the MLP that made them, and "
                "this one cannot go on training from it. Read it with masa.load and go on with plain coefficients, or "
                "keep torch.save(model.state_dict()) beside it."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


MAKERS = {"direct": DirectCoefficients, "mlp": MlpCoefficients, "legendre": LegendreCoefficients}
"""Values of ``coefficients`` in a :class:`masa.SharingSpec`."""
