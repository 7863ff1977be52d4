"""Every kind of storage under one budget: each matrix, or pair of matrices, takes what costs the model least."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partialmethod

from masa.compression.base import register
from masa.compression.methods.dictionary_pairs import RATIOS, DictionaryPairs
from masa.compression.methods.equal_bytes import Family
from masa.compression.methods.in_place import InPlace
from masa.compression.methods.low_rank_sparse import LowRankFamily, LowRankSparse
from masa.compression.methods.matrices import Matrix
from masa.compression.methods.pruning import compensated, keep, score
from masa.compression.methods.sparse_dictionary import Dictionary
from masa.errors import unknown

ANCHORS = (0.85, 0.6, 0.35)
"""Shares of the entries that stay where pruning with compensation is measured; between them it is interpolated."""


class MeasuredInPlace(InPlace):
    """Entries that stay where they are, at what they cost once the others make up for those that go.

    Dictionaries and low ranks are measured after their least squares, so pruning must be, too, where they compete.
    """

    def _removed(self, matrix: Matrix, rule: str, counts: Sequence[int]) -> dict[int, float]:
        total = matrix.weight.numel()
        anchors = [int(share * total) for share in ANCHORS]
        bare = super()._removed(matrix, rule, sorted({*counts, *anchors}))
        values = score(matrix, self.score)
        ratios = []
        for n in anchors:
            found = compensated(matrix, keep(values, n, self.scope), self.compensation, self.log, iterations=6)
            ratios.append(matrix.cost(rule, found) / bare[n] if bare[n] > 0 else 1.0)
        return {n: bare[n] * _between(n, anchors, ratios) for n in counts}


def _between(n: int, anchors: Sequence[int], values: Sequence[float]) -> float:
    """Linear between anchors, which descend, and constant beyond."""
    if n >= anchors[0]:
        return values[0]
    for upper, lower, high, low in zip(anchors, anchors[1:], values, values[1:], strict=False):
        if n >= lower:
            part = (n - lower) / max(1, upper - lower)
            return part * high + (1 - part) * low
    return values[-1]


@register("mixed")
class Mixed(DictionaryPairs):
    """All kinds in the metric of the data: errors are relative to each matrix's own outputs.

    A matrix is dense, low rank, sparse in place, low rank plus sparse, has a dictionary of its own, or one with others.

    Args:
        cost, allocation, outputs, scope, ratios, group_size, shared, rounds, bits: of
            :class:`~masa.compression.methods.dictionary_pairs.DictionaryPairs`.
        kinds: of storage to choose from, besides dense and shared dictionaries.
    """

    def __init__(
        self,
        cost: str = "whitened",
        allocation: str = "global",
        outputs: str = "none",
        scope: str = "matrix",
        ratios: Sequence[float] = RATIOS,
        group_size: int = 2,
        shared: str | None = None,
        rounds: int = 4,
        kinds: Sequence[str] | None = None,
        bits: Sequence[int] | None = None,
    ) -> None:
        super().__init__(cost, allocation, outputs, scope, ratios, group_size, shared, rounds, bits)
        self.kinds = kinds

    def families(self, log: dict[str, float]) -> list[Family]:
        entry = "loss" if self.needs_loss() else "wanda"
        found: list[Family] = [
            LowRankFamily(log),
            MeasuredInPlace(entry, "matrix", "exact", False, log),
            LowRankSparse(entry, "exact", 2, log),
            Dictionary("short", self.outputs, self.scope, 0.0, self.ratios, self.rounds, log),
        ]
        return found if self.kinds is None else [one_of(found, kind) for kind in self.kinds]


def one_of(families: Sequence[Family], kind: str) -> Family:
    """The family of a kind.

    Raises:
        MasaError: there is none.
    """
    names = {family.name: family for family in families}
    if kind not in names:
        raise unknown("Kind of storage", kind, names)
    return names[kind]


@register("mixed-fisher")
class MixedFisher(Mixed):
    """All kinds in the metric of the loss (ours). Needs a calibration with gradients.

    Args:
        cost, allocation, outputs, scope, ratios, group_size, shared, rounds, kinds, bits: of :class:`Mixed`.
    """

    __init__ = partialmethod(Mixed.__init__, cost="loss", outputs="diagonal")
