"""The two weight sources that compression solves for: atoms with low-rank factors, and shared heads.

Dimensions: L layers, S atoms, n layers of a group, r rank, (out, in) of one weight, R stored heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from masa.sharing.weight_sources import Weights, WeightSource, autocast_dtype, mix, register


@register("factored")
class Factored(WeightSource):
    """``W_l = sum_s C[l, s] D[s] + B_l A``, or W_l itself where a layer is stored dense.

    Matrix PCA, SVD, SVD-LLM and Basis Sharing are all of this form: Matrix PCA has atoms (arXiv 2508.04581, Eq. 4) and
    a low-rank residual for each layer, SVD-LLM has no atoms, and in Basis Sharing several layers read one A.

    Args:
        atoms: groups of layers with a dictionary in common, each ``{"layers": [...], "atoms": S}``.
        factors: groups of layers with a right factor A (r, in) in common and a left factor B_l (out, r) each, as
            ``{"layers": [...], "rank": r}``; a group of one layer is an ordinary low-rank factorisation.
        dense: layers stored as they are.
    """

    def __init__(
        self,
        projections: str,
        num_layers: int,
        shape: Sequence[int],
        atoms: Sequence[Mapping[str, Any]] = (),
        factors: Sequence[Mapping[str, Any]] = (),
        dense: Sequence[int] = (),
    ) -> None:
        super().__init__(projections, num_layers, tuple(shape))
        out, inp = self.shape
        self.atom_groups = [(list(g["layers"]), int(g["atoms"])) for g in atoms]
        self.factor_groups = [(list(g["layers"]), int(g["rank"])) for g in factors]
        self.dense_layers = list(dense)
        self.atoms = nn.ParameterList(torch.empty(s, out, inp) for _, s in self.atom_groups)
        self.coefficients = nn.ParameterList(torch.empty(len(layers), s) for layers, s in self.atom_groups)
        self.left = nn.ParameterList(torch.empty(len(layers), out, r) for layers, r in self.factor_groups)
        self.right = nn.ParameterList(torch.empty(r, inp) for _, r in self.factor_groups)
        self.dense = nn.ParameterList(torch.empty(out, inp) for _ in self.dense_layers)

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "atoms": [{"layers": layers, "atoms": s} for layers, s in self.atom_groups],
            "factors": [{"layers": layers, "rank": r} for layers, r in self.factor_groups],
            "dense": self.dense_layers,
        }

    def weights(self) -> Weights:
        like = next(self.parameters())
        terms: list[list[Tensor]] = [[] for _ in range(self.num_layers)]
        for (layers, _), atoms, coefficients in zip(self.atom_groups, self.atoms, self.coefficients, strict=True):
            for layer, weight in zip(layers, mix(coefficients, atoms), strict=True):
                terms[layer].append(weight)
        for (layers, _), left, right in zip(self.factor_groups, self.left, self.right, strict=True):
            for layer, weight in zip(layers, left @ right, strict=True):
                terms[layer].append(weight)
        for layer, weight in zip(self.dense_layers, self.dense, strict=True):
            terms[layer] = [weight.to(autocast_dtype(like))]
        # a layer that no term reaches is a matrix of rank 0
        zero = torch.zeros(self.shape, dtype=autocast_dtype(like), device=like.device)
        return {self.projections: tuple(sum(t[1:], t[0]) if t else zero for t in terms)}


@register("shared_heads")
class SharedHeads(WeightSource):
    """Layers read whole heads from one store: ``W_l = [heads[index[l, 0]], ..., heads[index[l, n - 1]]]``.

    Args:
        heads: number R of stored heads. Under grouped-query attention a head is what one key/value head serves.
        units: number of heads in one weight.
        axis: 0 if a head is a slice of rows (q, k, v), 1 if of columns (o).
    """

    index: Tensor

    def __init__(
        self, projections: str, num_layers: int, shape: Sequence[int], heads: int, units: int, axis: int
    ) -> None:
        super().__init__(projections, num_layers, tuple(shape))
        self.num_heads, self.units, self.axis = heads, units, axis
        out, inp = self.shape
        size = (out // units, inp) if axis == 0 else (out, inp // units)
        self.heads = nn.Parameter(torch.empty(heads, *size))
        self.index = nn.Buffer(torch.zeros(num_layers, units, dtype=torch.int32))

    def config(self) -> dict[str, Any]:
        return super().config() | {"heads": self.num_heads, "units": self.units, "axis": self.axis}

    def weights(self) -> Weights:
        gathered = self.heads[self.index.long()]  # (L, units, rows, columns)
        if self.axis == 1:
            gathered = gathered.transpose(1, 2)  # (L, out, units, in / units)
        stacked = gathered.reshape(self.num_layers, *self.shape)
        return {self.projections: stacked.to(autocast_dtype(self.heads)).unbind(0)}

    def stored_numbers(self) -> int:
        return super().stored_numbers() + self.index.numel()
