"""SVD in the metric of the loss: input autocorrelation on one side, output gradients on the other (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from masa.compression.algebra import Truncation, cholesky, truncation
from masa.compression.base import Problem, register
from masa.compression.svd_llm import LowRankCompressor


@register("svd-fisher")
class SvdFisher(LowRankCompressor):
    """Minimises ``tr(G dW H dW^T)``, the loss's second-order increase, over all matrices and ranks together.

    With G = R R^T and H = L L^T (see :mod:`masa.compression.gradients`) the best rank-r approximation of a matrix is
    the truncated SVD of ``R^T W L``, taken back by R^-T. All errors are in nats, so that matrices compete for ranks by
    what they cost the model and not by fractions of their own outputs.

    Args:
        ranks: a rule of :data:`~masa.compression.ranks.RANKS`.
        damping: added to G's diagonal, relative to its mean: directions without measured gradient still count a little.
    """

    needs_gradients = True

    def __init__(self, ranks: str | Mapping[str, Any] = "global-dense", damping: float = 0.01) -> None:
        super().__init__(ranks)
        self.damping = damping

    def solve(self, problem: Problem, letter: str, layer: int) -> Truncation:
        assert problem.calibration is not None
        weight = problem.weight(letter, layer)
        metric = problem.calibration.gradient_gram(letter, layer).to(weight.device)
        metric += self.damping * metric.diagonal().mean() * torch.eye(len(metric)).to(metric)
        root = cholesky(metric, f"gradients of {letter} of layer {layer}", problem.regularisation)
        found = truncation(root.T @ weight.double(), problem.gram(letter, layer))
        found.root = root
        return found

    def scale(self, truncations: Mapping[Any, Truncation]) -> None:
        total = sum(found.total for found in truncations.values())
        for found in truncations.values():
            found.total = total
