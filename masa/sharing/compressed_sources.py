"""The two weight sources that compression solves for: atoms with low-rank factors, and shared heads.

Dimensions: L layers, S atoms, n layers of a group, r rank, (out, in) of one weight, R stored heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from masa.sharing.products import (
    at_most,
    autocast_dtype,
    linear_in_atoms,
    linear_in_factors,
    mix,
    mix_one,
    on_device_of,
)
from masa.sharing.weight_sources import Weights, WeightSource, call, register, wrapped


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
        transposed: whether factors lie in memory as (in, r) and (r, out), which one token is multiplied by in half the
            time; folders of format 1 have them the other way.
    """

    def __init__(
        self,
        projections: str,
        num_layers: int,
        shape: Sequence[int],
        atoms: Sequence[Mapping[str, Any]] = (),
        factors: Sequence[Mapping[str, Any]] = (),
        dense: Sequence[int] = (),
        transposed: bool = False,
    ) -> None:
        super().__init__(projections, num_layers, tuple(shape))
        out, inp = self.shape
        self.atom_groups = [(list(g["layers"]), int(g["atoms"])) for g in atoms]
        self.factor_groups = [(list(g["layers"]), int(g["rank"])) for g in factors]
        self.dense_layers, self.transposed = list(dense), transposed
        self.mixed = nn.ModuleList(Mixture(len(layers), s, out, inp) for layers, s in self.atom_groups)
        self.factors = nn.ModuleList(
            (TransposedFactors if transposed else Factors)(len(layers), r, out, inp) for layers, r in self.factor_groups
        )
        self.stored = nn.ModuleList(Stored(out, inp) for _ in self.dense_layers)
        self.like = nn.Buffer(torch.empty(0), persistent=False)  # device and dtype of a source that stores nothing
        self._parts: list[list[tuple[str, str, int]]] = [[] for _ in range(num_layers)]  # of a layer: list, part, row
        for name, groups in (("mixed", self.atom_groups), ("factors", self.factor_groups)):
            for part, (layers, _) in enumerate(groups):
                for row, layer in enumerate(layers):
                    self._parts[layer].append((name, str(part), row))
        for part, layer in enumerate(self.dense_layers):
            self._parts[layer] = [("stored", str(part), 0)]

    def config(self) -> dict[str, Any]:
        return super().config() | {
            "atoms": [{"layers": layers, "atoms": s} for layers, s in self.atom_groups],
            "factors": [{"layers": layers, "rank": r} for layers, r in self.factor_groups],
            "dense": self.dense_layers,
            "transposed": self.transposed,
        }

    def parts(self, layer: int) -> list[tuple[nn.Module, int]]:
        """What W_l is the sum of, and which row of it is this layer's."""
        parts = [(self._modules[name]._modules[part], row) for name, part, row in self._parts[layer]]
        for part, _ in parts:
            if not isinstance(part, Mixture | Factors | Stored):
                raise wrapped(part, self.projections)
        return parts

    def weights(self) -> Weights:
        made = {(name, i): part() for name in ("mixed", "factors") for i, part in getattr(self, name).named_children()}
        made |= {("stored", i): part().unsqueeze(0) for i, part in self.stored.named_children()}
        terms = [[made[name, part][row] for name, part, row in self._parts[layer]] for layer in range(self.num_layers)]
        return {self.projections: tuple(sum(t[1:], t[0]) if t else self._zero() for t in terms)}

    def _zero(self) -> Tensor:
        """The weight of a layer that no term reaches: a matrix of rank 0."""
        return torch.zeros(self.shape, dtype=autocast_dtype(self.like), device=self.like.device)

    def layer_weight(self, projection: str, layer: int) -> Tensor:
        weight = None
        for part, row in self.parts(layer):
            if weight is None:
                weight = part(row)
            elif isinstance(part, Factors):
                weight = part(row, onto=weight)
            else:
                weight = weight + part(row)
        return self._zero() if weight is None else weight

    def product(self, projection: str, layer: int, x: Tensor, bias: Tensor | None) -> Tensor:
        parts = self.parts(layer)
        if not parts:
            zero = x.new_zeros(*x.shape[:-1], self.shape[0])
            return zero if bias is None else zero + bias
        out, inp = self.shape
        if len(parts) > 1 and not at_most(x, out * inp // (out + inp)):  # one product costs less than one a part
            return super().product(projection, layer, x, bias)
        y = call(*parts[0], x, bias)
        for part, row in parts[1:]:
            y = y + call(part, row, x)
        return y

    def read_numbers(self) -> int:
        out, inp = self.shape
        mixed = sum(len(layers) * count * out * inp for layers, count in self.atom_groups)
        low = sum(len(layers) * rank * (out + inp) for layers, rank in self.factor_groups)
        return mixed + low + len(self.dense_layers) * out * inp


class Mixture(nn.Module):
    """n layers' mixtures of S atoms: called with a row and x it multiplies, with a row it is one weight, else all."""

    def __init__(self, layers: int, count: int, out: int, inp: int) -> None:
        super().__init__()
        self.atoms = nn.Parameter(torch.empty(count, out, inp))
        self.coefficients = nn.Parameter(torch.empty(layers, count))

    def forward(self, row: int | None = None, x: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if row is None:
            return mix(self.coefficients, self.atoms)
        if x is None:
            return mix_one(self.coefficients.select(0, row), self.atoms)
        return linear_in_atoms(x, self.coefficients.select(0, row), self.atoms, bias)


class Factors(nn.Module):
    """n layers' left factors B_l and the right factor A that they have in common; called as :class:`Mixture` is.

    Given ``onto``, one weight is added to that.
    """

    def __init__(self, layers: int, rank: int, out: int, inp: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.empty(layers, out, rank))
        self.right = nn.Parameter(torch.empty(rank, inp))

    @torch.no_grad()
    def fill(self, left: Tensor, right: Tensor) -> None:
        """Copy B (n * out, r) and A (r, in) of any dtype and device."""
        self.left.copy_(left.view(self.left.shape))
        self.right.copy_(right)

    def pair(self, row: int) -> tuple[Tensor, Tensor]:
        """B_l (out, r) and A (r, in), views."""
        return self.left.select(0, row), self.right

    def all(self) -> Tensor:
        """B_l A of every layer, (n, out, in)."""
        return self.left @ self.right

    def multiply(self, row: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """``(x A^T) B_l^T + b``."""
        return linear_in_factors(x, *self.pair(row), bias)

    def forward(
        self,
        row: int | None = None,
        x: Tensor | None = None,
        bias: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        if row is None:
            return self.all()
        if x is not None:
            return self.multiply(row, x, bias)
        left, right = self.pair(row)
        return left @ right if onto is None else torch.addmm(onto, left, right)


class TransposedFactors(Factors):
    """As :class:`Factors`, with A^T (in, r) and B_l^T (r, out); one layer's is not stacked."""

    def __init__(self, layers: int, rank: int, out: int, inp: int) -> None:
        nn.Module.__init__(self)
        self.left = nn.Parameter(torch.empty(*([layers] if layers > 1 else []), rank, out))
        self.right = nn.Parameter(torch.empty(inp, rank))

    @torch.no_grad()
    def fill(self, left: Tensor, right: Tensor) -> None:
        rank, out = self.left.shape[-2:]
        self.left.copy_(left.view(-1, out, rank).mT.reshape(self.left.shape))
        self.right.copy_(right.T)

    def pair(self, row: int) -> tuple[Tensor, Tensor]:
        return self._row(row).t(), self.right.t()

    def _row(self, row: int) -> Tensor:
        left = self.left
        return left if left.ndim == 2 else left.select(0, row)

    def all(self) -> Tensor:
        product = self.left.transpose(-1, -2) @ self.right.t()
        return product if self.left.ndim == 3 else product.unsqueeze(0)

    def multiply(self, row: int, x: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.matmul(torch.matmul(on_device_of(self.right, x), self.right), self._row(row))
        return y if bias is None else y + bias


class Stored(nn.Module):
    """One layer's matrix as it is; called as :class:`Mixture` is."""

    def __init__(self, out: int, inp: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, inp))

    def forward(self, row: int | None = None, x: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        if x is None:
            return self.weight.to(autocast_dtype(self.weight))
        return nn.functional.linear(on_device_of(self.weight, x), self.weight, bias)


EARLIER_NAMES = {
    r"(\.|^)shared\.(\w+)\.atoms\.(\d+)$": r"\1shared.\2.mixed.\3.atoms",
    r"(\.|^)shared\.(\w+)\.coefficients\.(\d+)$": r"\1shared.\2.mixed.\3.coefficients",
    r"(\.|^)shared\.(\w+)\.(left|right)\.(\d+)$": r"\1shared.\2.factors.\4.\3",
    r"(\.|^)shared\.(\w+)\.dense\.(\d+)$": r"\1shared.\2.stored.\3.weight",
}
"""Names in folders of format 1 -> names today, as regular expressions."""


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

    def layer_weight(self, projection: str, layer: int) -> Tensor:
        heads = self.heads.index_select(0, self.index.select(0, layer))  # (units, rows, columns)
        heads = heads.to(autocast_dtype(self.heads))
        return (heads.transpose(0, 1) if self.axis == 1 else heads).reshape(self.shape)

    def stored_numbers(self) -> int:
        return super().stored_numbers() + self.index.numel()
