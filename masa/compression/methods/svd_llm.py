"""Plain SVD, SVD-LLM (Wang et al. 2024, arXiv 2403.07378) and ours: one method, three metrics, any rank rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from masa.compression.allocation.ranks import Key, RankAllocator, does_something, make_ranks
from masa.compression.base import Compressor, Problem, register
from masa.compression.methods.algebra import Truncation
from masa.compression.methods.low_rank import Factors, factored_sources, factorise, ranks_by_projection
from masa.compression.methods.metrics import DataMetric, FisherMetric, WeightMetric, check_some_gradient
from masa.compression.methods.update import sequential_update
from masa.sharing.weight_sources import WeightSource


class LowRankCompressor(Compressor):
    """Every matrix by itself becomes a product of two factors.

    Args:
        ranks: a rule of :data:`~masa.compression.allocation.ranks.RANKS`.
    """

    def __init__(self, ranks: str | Mapping[str, Any] = "uniform") -> None:
        self.ranks = ranks

    def metric(self) -> WeightMetric:
        """What the truncation minimises."""
        raise NotImplementedError

    def refine(self, problem: Problem, factors: Factors) -> Factors:
        """Improve the factors once the ranks are known."""
        return factors

    def prepare(self, problem: Problem) -> tuple[RankAllocator, dict[Key, Truncation]]:
        metric, truncations = self.metric(), dict[Key, Truncation]()
        allocator = make_ranks(self.ranks)
        for layer in problem.layers:
            problem.progress("factorising", layer, len(problem.layers))
            for letter in problem.letters_of(layer):
                truncations[letter, (layer,)] = metric.truncate(problem, letter, layer)
        check_some_gradient(problem, [key for key, found in truncations.items() if not does_something(found)])
        metric.scale(truncations)
        return allocator, truncations

    def solve(self, problem: Problem, prepared: tuple[RankAllocator, dict[Key, Truncation]]) -> list[WeightSource]:
        allocator, truncations = prepared
        ranks = allocator.allocate(truncations, problem.budget)
        self.ranks_ = ranks_by_projection(ranks)
        self.error_ = relative_error(truncations, ranks)
        factors = factorise(truncations, ranks, lambda key: problem.weight(key[0], key[1][0]))
        return factored_sources(problem, self.refine(problem, factors), ranks)


def relative_error(truncations: Mapping[Key, Truncation], ranks: Mapping[Key, int | None]) -> float:
    """Mean over matrices of the discarded energy over its scale, ``tail_k(r) / total_k``."""
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

    def metric(self) -> WeightMetric:
        return WeightMetric()


@register("svd-llm")
class SvdLlm(LowRankCompressor):
    """SVD in the metric of the data: minimises ``||X W^T - X (BA)^T||_F`` for every matrix."""

    def metric(self) -> WeightMetric:
        return DataMetric()


@register("svd-llm-update")
class SvdLlmUpdate(SvdLlm):
    """SVD-LLM with its sequential update of the left factors to compressed inputs.

    Args:
        ranks: a rule of :data:`~masa.compression.allocation.ranks.RANKS`.
        samples: sequences of the calibration's tokens that the update runs over; None for all.
    """

    needs_tokens = True

    def __init__(self, ranks: str | Mapping[str, Any] = "uniform", samples: int | None = 16) -> None:
        super().__init__(ranks)
        self.samples = samples

    def refine(self, problem: Problem, factors: Factors) -> Factors:
        return sequential_update(problem, factors, self.samples)


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


@register("svd-global-update")
class SvdGlobalUpdate(SvdLlmUpdate):
    """Global ranks with the dense option, then the sequential update (ours); arguments of :class:`SvdLlmUpdate`."""

    def __init__(self, ranks: str | Mapping[str, Any] = "global-dense", samples: int | None = 16) -> None:
        super().__init__(ranks, samples)


@register("svd-fisher")
class SvdFisher(LowRankCompressor):
    """SVD in the metric of the loss, and ranks that compete in nats (ours).

    With G = R R^T and H = L L^T the best rank-r approximation of a matrix is the truncated SVD of ``R^T W L``, taken
    back by R^-T. Needs a calibration with gradients.

    Args:
        ranks: a rule of :data:`~masa.compression.allocation.ranks.RANKS`.
        damping: of G, see :class:`~masa.compression.methods.metrics.FisherMetric`.
    """

    def __init__(self, ranks: str | Mapping[str, Any] = "global-dense", damping: float = 0.01) -> None:
        super().__init__(ranks)
        self.damping = damping

    def metric(self) -> WeightMetric:
        return FisherMetric(self.damping)


@register("svd-fisher-update")
class SvdFisherUpdate(SvdFisher):
    """:class:`SvdFisher`, then the sequential update (the best left factor for given inputs is the same for any G).

    Args:
        ranks, damping: of :class:`SvdFisher`.
        samples: of :class:`SvdLlmUpdate`.
    """

    needs_tokens = True

    def __init__(
        self,
        ranks: str | Mapping[str, Any] = "global-dense",
        damping: float = 0.01,
        samples: int | None = 16,
    ) -> None:
        super().__init__(ranks, damping)
        self.samples = samples

    def refine(self, problem: Problem, factors: Factors) -> Factors:
        return sequential_update(problem, factors, self.samples)
