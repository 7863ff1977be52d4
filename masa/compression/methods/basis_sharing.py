"""Basis Sharing (Wang et al. 2024, arXiv 2410.03765): consecutive layers share a basis of their input space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from masa.compression.allocation.grouping import fixed
from masa.compression.allocation.ranks import Key, RankAllocator, make_ranks
from masa.compression.base import Compressor, Problem, register
from masa.compression.methods.algebra import Truncation, refit, truncation
from masa.compression.methods.low_rank import Factors, factored_sources, factorise, ranks_by_projection
from masa.compression.methods.svd_llm import relative_error
from masa.errors import MasaError
from masa.sharing.weight_sources import WeightSource


@register("basis-sharing")
class BasisSharing(Compressor):
    """``[W_1; ...; W_g] = [B_1; ...; B_g] A``: one A (k, in) for a group, in the metric of the members' summed H.

    Args:
        group_size: g consecutive layers, or all if there are fewer; the last group may be smaller.
        shared: projections that share a basis; the others (o, as published) are factored layer by layer.
        refit: solve every layer's B again on that layer's own data, given A.
        ranks: a rule of :data:`~masa.compression.allocation.ranks.RANKS`; "uniform" gives the published
            ``k = floor(keep * in * g * out / (in + g * out))``.
    """

    def __init__(
        self,
        group_size: int = 2,
        shared: str = "qkv",
        refit: bool = False,
        ranks: str | Mapping[str, Any] = "uniform",
    ) -> None:
        self.group_size, self.shared, self.refit, self.ranks = group_size, shared, refit, ranks

    def prepare(self, problem: Problem) -> tuple[RankAllocator, dict[Key, Truncation]]:
        most = max(2, len(problem.layers))  # so that the default is none to refuse
        if not isinstance(self.group_size, int) or not 1 <= self.group_size <= most:
            raise MasaError(f"group_size must lie between 1 and L = {len(problem.layers)}, got {self.group_size}.")
        allocator, truncations = make_ranks(self.ranks), dict[Key, Truncation]()
        for letter in problem.projections:
            size = self.group_size if letter in self.shared else 1
            layers = problem.layers_of(letter)
            for positions in fixed([0.0] * (len(layers) - 1), size):
                group = [layers[i] for i in positions]
                problem.progress(f"factorising {letter}", group[0], len(problem.layers))
                key = letter, tuple(group)
                gram = problem.gram(letter, group[0])
                for layer in group[1:]:
                    gram = gram + problem.gram(letter, layer)
                truncations[key] = truncation(_stacked(problem, key), gram)
        return allocator, truncations

    def solve(self, problem: Problem, prepared: tuple[RankAllocator, dict[Key, Truncation]]) -> list[WeightSource]:
        allocator, truncations = prepared
        ranks = allocator.allocate(truncations, problem.budget)
        self.ranks_ = ranks_by_projection(ranks)
        self.error_ = relative_error(truncations, ranks)
        factors = factorise(truncations, ranks, lambda key: _stacked(problem, key))
        return factored_sources(problem, self._refit(problem, factors) if self.refit else factors, ranks)

    def _refit(self, problem: Problem, factors: Factors) -> Factors:
        refitted: Factors = {}
        for (letter, layers), (_, right) in factors.items():
            left = [
                refit(
                    problem.weight(letter, layer),
                    right,
                    problem.gram(letter, layer),
                    f"{letter} of layer {layer}",
                    problem.regularisation,
                )
                for layer in layers
            ]
            refitted[letter, layers] = torch.cat(left), right
        return refitted


def _stacked(problem: Problem, key: Key) -> Tensor:
    """A group's weights one above the other, (n * out, in)."""
    letter, layers = key
    return torch.cat([problem.weight(letter, layer) for layer in layers])
