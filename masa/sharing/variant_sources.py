"""Sharing as others do it today, by the one mechanism: coefficients for each head; shared sets with low-rank parts.

Neither is the paper's. Dimensions as in :mod:`masa.sharing.weight_sources`; H heads of one weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from masa.sharing.products import linear_in_factors, mix, on_device_of
from masa.sharing.spec import ModelShape, SharingSpec
from masa.sharing.weight_sources import Repeat, Weights, WeightSource, register


@register("head_atoms")
class HeadAtoms(WeightSource):
    """MASA with coefficients of their own for each head: head h of layer l is ``sum_s C[h, l, s] D[s]_h``.

    Args:
        atoms: S.
        heads: H of this projection: its query, or its key/value heads.
        axis: 0 where a head is a slice of rows (q, k, v), 1 where it is one of columns (o).

    With one head it is MASA. Every row of C has norm 1 at initialisation, as there.
    """

    def __init__(
        self, projections: str, num_layers: int, shape: tuple[int, int], atoms: int, heads: int, axis: int
    ) -> None:
        super().__init__(projections, num_layers, shape)
        self.num_atoms, self.heads, self.axis = atoms, heads, axis
        self.atoms = nn.Parameter(torch.empty(atoms, *self.shape))
        self.values = nn.Parameter(torch.empty(heads, num_layers, atoms))

    @classmethod
    def from_spec(cls, spec: SharingSpec, shape: ModelShape) -> list[WeightSource]:
        return [
            cls(
                p,
                shape.count(p),
                shape.shapes[p],
                atoms=spec.atoms_of(p),
                heads=shape.num_key_value_heads if p in "kv" else shape.num_attention_heads,
                axis=int(p == "o"),
            )
            for p in spec.projections or ""
        ]

    def config(self) -> dict[str, Any]:
        return super().config() | {"atoms": self.num_atoms, "heads": self.heads, "axis": self.axis}

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.atoms, std=std)
        nn.init.normal_(self.values)
        self.values.copy_(nn.functional.normalize(self.values, dim=-1))

    def _mixed(self, coefficients: Tensor) -> Tensor:
        """Weights of some layers: (H, n, S) -> (n, out, in)."""
        parts = self.atoms.chunk(self.heads, dim=1 + self.axis)
        return torch.cat([mix(coefficients.select(0, h), part) for h, part in enumerate(parts)], dim=1 + self.axis)

    def weights(self) -> Weights:
        return {self.projections: self._mixed(self.values).unbind(0)}

    def layer_weight(self, projection: str, layer: int) -> Tensor:
        return self._mixed(self.values.narrow(1, layer, 1)).squeeze(0)

    def read_numbers(self) -> int:
        return self.num_atoms * self.dense_numbers()

    def coefficient_parameters(self) -> Iterator[nn.Parameter]:
        yield self.values


@register("relaxed")
class Relaxed(Repeat):
    """M sets that repeat over the layers, and a low-rank part for each use: ``W_l = V[l % M] + B_l A_l``.

    The recursion with low-rank parts of Bae et al. (2024, arXiv 2410.20672), trained from scratch: B begins at zero.
    """

    def __init__(self, projections: str, num_layers: int, shape: tuple[int, int], sets: int, rank: int) -> None:
        super().__init__(projections, num_layers, shape, sets)
        self.rank = rank
        self.left = nn.Parameter(torch.empty(num_layers, self.shape[0], rank))
        self.right = nn.Parameter(torch.empty(num_layers, rank, self.shape[1]))

    @classmethod
    def from_spec(cls, spec: SharingSpec, shape: ModelShape) -> list[WeightSource]:
        sizes = {"sets": int(spec.sets or 1), "rank": int(spec.rank or 1)}
        return [cls(p, shape.count(p), shape.shapes[p], **sizes) for p in spec.projections or ""]

    def config(self) -> dict[str, Any]:
        return super().config() | {"rank": self.rank}

    def reset_parameters(self, std: float) -> None:
        super().reset_parameters(std)
        nn.init.zeros_(self.left)
        nn.init.normal_(self.right, std=std)

    def weights(self) -> Weights:
        low = torch.bmm(self.left, self.right).unbind(0)
        shared = super().weights()[self.projections]
        return {self.projections: tuple(v + part for v, part in zip(shared, low, strict=True))}

    def layer_weight(self, projection: str, layer: int) -> Tensor:
        return torch.addmm(
            super().layer_weight(projection, layer), self.left.select(0, layer), self.right.select(0, layer)
        )

    def product(self, projection: str, layer: int, x: Tensor, bias: Tensor | None) -> Tensor:
        shared = super().layer_weight(projection, layer)
        y = nn.functional.linear(on_device_of(shared, x), shared, bias)
        return y + linear_in_factors(x, self.left.select(0, layer), self.right.select(0, layer), None)

    def read_numbers(self) -> int:
        return self.dense_numbers() + self.left.numel() + self.right.numel()
