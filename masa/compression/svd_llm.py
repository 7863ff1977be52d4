"""Plain SVD and SVD-LLM (Wang et al. 2024, arXiv 2403.07378), with any rank rule and the sequential update."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from masa.compression.algebra import Truncation, refit, truncation
from masa.compression.base import Compressor, Problem, register
from masa.compression.calibration import BlockStream, GramHooks
from masa.compression.low_rank import Factors, factored_sources, factorise, ranks_by_projection
from masa.compression.ranks import Key, make_ranks
from masa.compression.statistics import INPUT_OF
from masa.projections import family_of
from masa.weight_sources import WeightSource


class LowRankCompressor(Compressor):
    """Every matrix by itself becomes a product of two factors.

    Args:
        ranks: a rule of :data:`~masa.compression.ranks.RANKS`.
    """

    def __init__(self, ranks: str | Mapping[str, Any] = "uniform") -> None:
        self.ranks = ranks

    def solve(self, problem: Problem, letter: str, layer: int) -> Truncation:
        """The best approximations of one matrix at every rank."""
        raise NotImplementedError

    def scale(self, truncations: Mapping[Key, Truncation]) -> None:
        """Set the ``total`` by which every matrix's errors are divided when ranks are allocated."""

    def refine(self, problem: Problem, factors: Factors) -> Factors:
        """Improve the factors once the ranks are known."""
        return factors

    def fit(self, problem: Problem) -> list[WeightSource]:
        allocator, truncations = make_ranks(self.ranks), {}
        for layer in problem.layers:
            problem.progress("factorising", layer, len(problem.layers))
            for letter in problem.projections:
                truncations[letter, (layer,)] = self.solve(problem, letter, layer)
        self.scale(truncations)
        ranks = allocator.allocate(truncations, problem.budget)
        self.ranks_ = ranks_by_projection(ranks)
        self.error_ = relative_error(truncations, ranks)
        return factored_sources(problem, self.refine(problem, factorise(truncations, ranks)), ranks)


def relative_error(truncations: Mapping[Key, Any], ranks: Mapping[Key, int | None]) -> float:
    """Mean over matrices of ``||X W^T - X W_r^T||^2 / ||X W^T||^2``, the objective of the global rank rule."""
    tails = [
        float(truncations[key].energy[rank:].sum()) / max(truncations[key].total, 1e-300)
        for key, rank in ranks.items()
        if rank is not None
    ]
    return sum(tails) / len(ranks)


@register("svd")
class Svd(LowRankCompressor):
    """Truncated SVD of the weights alone, blind to the data: the floor."""

    needs_calibration = False

    def solve(self, problem: Problem, letter: str, layer: int) -> Truncation:
        return truncation(problem.weight(letter, layer))


@register("svd-llm")
class SvdLlm(LowRankCompressor):
    """SVD in the metric of the data: minimises ``||X W^T - X (BA)^T||_F`` for every matrix."""

    def solve(self, problem: Problem, letter: str, layer: int) -> Truncation:
        return truncation(problem.weight(letter, layer), problem.gram(letter, layer))


@register("svd-llm-global")
class SvdLlmGlobal(SvdLlm):
    """SVD-LLM with globally allocated ranks: the control that the paper lacks."""

    def __init__(self, ranks: str | Mapping[str, Any] = "global") -> None:
        super().__init__(ranks)


@register("svd-global")
class SvdGlobal(SvdLlm):
    """SVD-LLM with globally allocated ranks and the option to leave a matrix dense (ours)."""

    def __init__(self, ranks: str | Mapping[str, Any] = "global-dense") -> None:
        super().__init__(ranks)


@register("svd-llm-update")
class SvdLlmUpdate(SvdLlm):
    """SVD-LLM with its sequential update: layer by layer, the left factors are refitted to compressed inputs.

    Ranks and right factors come from the dense model's statistics. Then every layer sees what the compressed layers
    before it produce, X', and ``B = argmin ||X' W^T - X' (BA)^T||_F`` in closed form. Two passes over the tokens.
    """

    needs_tokens = True

    @torch.no_grad()
    def refine(self, problem: Problem, factors: Factors) -> Factors:
        assert problem.tokens is not None
        paths, refined = dict(family_of(problem.model).paths), dict(factors)
        stream = BlockStream(problem.model, problem.tokens, problem.batch_size)
        hooks = GramHooks(paths, problem.projections)
        for layer in problem.layers:
            problem.progress("updating", layer, len(problem.layers))
            block = stream.block(layer)
            handles = hooks.attach(block)
            try:
                stream.run(block, keep=False)
            finally:
                for handle in handles:
                    handle.remove()
            compressed = copy.deepcopy(block)
            for letter in problem.projections:
                key = (letter, (layer,))
                if key not in factors:
                    continue
                right, weight = factors[key][1], problem.weight(letter, layer)
                gram = hooks.grams[INPUT_OF[letter]]
                left = refit(weight, right, gram, f"{letter} of layer {layer}", problem.regularisation)
                refined[key] = left, right
                compressed.get_submodule(paths[letter]).weight.copy_(left @ right)
            stream.run(compressed)
        return refined


@register("svd-global-update")
class SvdGlobalUpdate(SvdLlmUpdate):
    """Global ranks with the dense option, then the sequential update (ours)."""

    def __init__(self, ranks: str | Mapping[str, Any] = "global-dense") -> None:
        super().__init__(ranks)
