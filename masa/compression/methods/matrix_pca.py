"""Matrix PCA (arXiv 2508.04581, Eq. 4): a group's matrices as combinations of S matrix atoms, and what is left over.

Dimensions: n layers of a group, S atoms, (out, in) of one weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from masa.compression.allocation.grouping import make_groups
from masa.compression.allocation.ranks import Key, RankAllocator, make_ranks
from masa.compression.base import Compressor, Problem, register, unreachable
from masa.compression.methods.algebra import EPS, Truncation, nothing
from masa.compression.methods.low_rank import AtomGroup, factored_sources, factorise, ranks_by_projection
from masa.compression.methods.metrics import WeightMetric, check_some_gradient, make_metric
from masa.compression.methods.svd_llm import relative_error
from masa.errors import MasaError
from masa.sharing.weight_sources import WeightSource


def matrix_pca(weights: Sequence[Tensor], atoms: int, metric: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The best S atoms of n matrices, through the n x n Gram matrix ``<W_i, W_j>``, without centring.

    ``D_s = sum_l u_s[l] W_l / sqrt(lam_s)`` and ``C[l, s] = sqrt(lam_s) u_s[l]`` for the largest eigenpairs
    (lam_s, u_s); the squared error is the sum of the dropped eigenvalues. The entry of u_s largest in magnitude is
    positive; eigenvalues at rounding level are dropped, so that fewer than S atoms may come back.

    Args:
        weights: n matrices (out, in).
        atoms: S.
        metric: (in, in); measure errors as ``tr(W H W^T)`` instead of ``tr(W W^T)`` (data-aware atoms, ours).

    Returns:
        atoms (S, out, in) and coefficients (n, S) in float64, and all n eigenvalues, descending.

    Raises:
        MasaError: S is not between 1 and n.
    """
    if not 1 <= atoms <= len(weights):
        raise MasaError(f"atoms = {atoms} must lie between 1 and the group's size, {len(weights)}.")
    stacked = torch.stack([weight.double() for weight in weights])
    measured = stacked if metric is None else stacked @ metric
    gram = measured.flatten(1) @ stacked.flatten(1).T
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = [s for s in range(atoms) if values[s] > len(weights) * EPS * values[0]]
    basis, scale = vectors[:, kept], values[kept].sqrt()
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * largest.sign()
    dictionary = ((basis / scale).T @ stacked.flatten(1)).view(-1, *stacked.shape[1:])
    return dictionary, basis * scale, values.clamp_min(0)


@dataclass(frozen=True)
class Prepared:
    """What does not depend on the budget; :meth:`MatrixPCA.solve` changes none of it.

    Attributes:
        groups: of layers, by projection.
        idle: matrices that do nothing, of which no atoms are made.
        dictionaries: atoms by projection.
        truncations: of what the atoms leave over.
        metric: that the residual is measured in.
        allocator: of its ranks.
    """

    groups: dict[str, list[list[int]]]
    idle: set[Key]
    dictionaries: dict[str, list[AtomGroup]]
    truncations: dict[Key, Truncation]
    metric: WeightMetric
    allocator: RankAllocator


@register("matrix-pca")
class MatrixPCA(Compressor):
    """Atoms for groups of consecutive layers, and a low-rank residual in the metric of each layer's data.

    The paper gives neither the split of the budget between atoms and residual nor its ranks. Ours: S atoms a group are
    given, and the residual gets what the budget leaves, by global allocation.

    Args:
        grouping: a rule of :data:`~masa.compression.allocation.grouping.GROUPINGS`.
        atoms: S of every group (at most its size).
        ranks: a rule of :data:`~masa.compression.allocation.ranks.RANKS` for the residual. With "global-dense" a layer
            may be stored as it is; a group without layers stores no atoms.
        metric: "weights" (Eq. 4), or "data": atoms in the group's mean normalised autocorrelation (ours).
        residual: a metric of :data:`~masa.compression.methods.metrics.METRICS` for the residual.
    """

    def __init__(
        self,
        grouping: str | Mapping[str, Any] = "optimal",
        atoms: int = 1,
        ranks: str | Mapping[str, Any] = "global-dense",
        metric: str = "weights",
        residual: str | Mapping[str, Any] = "data",
    ) -> None:
        self.grouping, self.atoms, self.ranks, self.metric, self.residual = grouping, atoms, ranks, metric, residual

    def prepare(self, problem: Problem) -> Prepared:
        assert problem.calibration is not None
        if self.metric not in ("weights", "data"):
            raise MasaError(f"metric must be 'weights' or 'data', got {self.metric!r}.")
        allocator = make_ranks(self.ranks)
        groups = {p: self.groups(problem, p) for p in problem.projections}
        metric, truncations = make_metric(self.residual), dict[Key, Truncation]()
        idle: set[Key] = {
            (p, (n,)) for p in problem.projections for n in problem.layers_of(p) if metric.idle(problem, p, n)
        }
        check_some_gradient(problem, idle)
        dictionaries = {p: self._dictionaries(problem, p, groups[p], idle) for p in problem.projections}
        for letter, found in dictionaries.items():
            for group in groups[letter]:
                problem.progress(f"residual of {letter}", group[0], len(problem.layers))
                for layer in group:
                    key = letter, (layer,)
                    if key in idle:
                        truncations[key] = nothing(problem.weight(letter, layer))
                    else:
                        left_over = _left_over(problem, letter, layer, found)
                        truncations[key] = metric.truncate(problem, letter, layer, left_over)
        metric.scale(truncations)
        return Prepared(groups, idle, dictionaries, truncations, metric, allocator)

    def groups(self, problem: Problem, letter: str) -> list[list[int]]:
        """Runs of the layers that have a projection; between two of these, the drift of all blocks adds up."""
        assert problem.calibration is not None
        layers, drift = problem.layers_of(letter), problem.calibration.drift
        between = drift if len(layers) == len(drift) + 1 else [sum(drift[a:b]) for a, b in pairwise(layers)]
        return [[layers[i] for i in group] for group in make_groups(self.grouping, between)]

    def solve(self, problem: Problem, prepared: Prepared) -> list[WeightSource]:
        first, *others = prepared.groups.values()
        self.groups_ = first if all(found == first for found in others) else prepared.groups
        dictionaries = {letter: list(found) for letter, found in prepared.dictionaries.items()}
        truncations, metric, allocator = dict(prepared.truncations), prepared.metric, prepared.allocator
        if sum(problem.numbers(p) for p, _ in truncations.keys() - prepared.idle) <= problem.budget:
            return self._dense(problem, prepared)
        used = sum(group.numbers() for found in dictionaries.values() for group in found)
        if used >= problem.budget:
            groups = max(map(len, prepared.groups.values()))
            raise unreachable(problem, used, f"{self.atoms} atom(s) for each of {groups} groups alone store")
        ranks = allocator.allocate(truncations, problem.budget - used, least=0)
        while idle := _idle_atoms(dictionaries, ranks):  # what they free buys more ranks
            for letter, group in idle:
                dictionaries[letter].remove(group)
                used -= group.numbers()
                for layer in group.layers:
                    scale = truncations[letter, (layer,)].total
                    truncations[letter, (layer,)] = metric.truncate(problem, letter, layer)
                    truncations[letter, (layer,)].total = scale
            ranks = allocator.allocate(truncations, problem.budget - used, least=0)
        self.ranks_ = ranks_by_projection(ranks)
        self.error_ = relative_error(truncations, ranks)
        factors = factorise(
            truncations, ranks, lambda key: _left_over(problem, key[0], key[1][0], dictionaries[key[0]])
        )
        return factored_sources(problem, factors, ranks, dictionaries)

    def _dense(self, problem: Problem, prepared: Prepared) -> list[WeightSource]:
        """Matrices that do nothing leave room for all others as they are."""
        ranks: dict[Key, int | None] = {key: 0 if key in prepared.idle else None for key in prepared.truncations}
        self.ranks_, self.error_ = ranks_by_projection(ranks), 0.0
        return factored_sources(problem, {}, ranks)

    def _dictionaries(
        self, problem: Problem, letter: str, groups: Sequence[list[int]], idle: Collection[Key]
    ) -> list[AtomGroup]:
        """One for each group; none for a layer that is left alone, whose only atom would be its matrix.

        That is since the others of its group do nothing, or since there are no others; a rule that cuts groups of one
        layer gets its atoms.
        """
        found = []
        for group in groups:
            live = [layer for layer in group if (letter, (layer,)) not in idle]
            if len(live) > 1 or (live == group and problem.shape.count(letter) > 1):
                found.append(self._atoms(problem, letter, live))
        return found

    def _atoms(self, problem: Problem, letter: str, layers: list[int]) -> AtomGroup:
        weights = [problem.weight(letter, layer) for layer in layers]
        metric = None
        if self.metric == "data":
            grams = [problem.gram(letter, layer) for layer in layers]
            metric = sum(gram / gram.diagonal().sum().clamp_min(torch.finfo(gram.dtype).tiny) for gram in grams)
        dictionary, coefficients, _ = matrix_pca(weights, min(self.atoms, len(layers)), metric)
        return AtomGroup(layers, dictionary.to(weights[0].dtype), coefficients.to(weights[0].dtype))


def _left_over(problem: Problem, letter: str, layer: int, groups: Sequence[AtomGroup]) -> Tensor:
    """A layer's weight (out, in) without what its group's atoms make of it; all of it without a group."""
    weight = problem.weight(letter, layer)
    for group in groups:
        if layer in group.layers:
            return weight - torch.tensordot(group.coefficients[group.layers.index(layer)], group.atoms, 1)
    return weight


def _idle_atoms(
    dictionaries: Mapping[str, list[AtomGroup]], ranks: Mapping[Key, int | None]
) -> list[tuple[str, AtomGroup]]:
    """Dictionaries whose layers are all stored dense."""
    return [
        (letter, group)
        for letter, found in dictionaries.items()
        for group in found
        if all(ranks[letter, (layer,)] is None for layer in group.layers)
    ]


@register("matrix-pca-role")
class MatrixPCARole(MatrixPCA):
    """Matrix PCA with the residual's ranks split by role, as the paper words it: more to q and o than to k and v."""

    def __init__(
        self,
        grouping: str | Mapping[str, Any] = "optimal",
        atoms: int = 1,
        ranks: str | Mapping[str, Any] = "role",
        metric: str = "weights",
        residual: str | Mapping[str, Any] = "data",
    ) -> None:
        super().__init__(grouping, atoms, ranks, metric, residual)


@register("matrix-pca-data")
class MatrixPCAData(MatrixPCA):
    """Matrix PCA with atoms in the metric of the data and globally allocated residual ranks (ours)."""

    def __init__(
        self,
        grouping: str | Mapping[str, Any] = "optimal",
        atoms: int = 1,
        ranks: str | Mapping[str, Any] = "global-dense",
        metric: str = "data",
        residual: str | Mapping[str, Any] = "data",
    ) -> None:
        super().__init__(grouping, atoms, ranks, metric, residual)


@register("matrix-pca-fisher")
class MatrixPCAFisher(MatrixPCA):
    """Matrix PCA whose residual and ranks are in the metric of the loss (ours); needs gradients."""

    def __init__(
        self,
        grouping: str | Mapping[str, Any] = "optimal",
        atoms: int = 1,
        ranks: str | Mapping[str, Any] = "global-dense",
        metric: str = "weights",
        residual: str | Mapping[str, Any] = "fisher",
    ) -> None:
        super().__init__(grouping, atoms, ranks, metric, residual)
