"""Low rank, and low rank plus sparse, as options of a matrix under a budget in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial, partialmethod
from typing import Any

from torch import Tensor

from masa.compression.allocation.bytes import Option
from masa.compression.base import register
from masa.compression.methods.algebra import Truncation, cholesky, truncation
from masa.compression.methods.equal_bytes import ByteCompressor, Family
from masa.compression.methods.fits import Fit, low_rank_fit, part_bytes, sparse_fit
from masa.compression.methods.matrices import Matrix
from masa.compression.methods.pruning import compensated, keep, score

SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35)
RANK_SHARES = (0.1, 0.25, 0.5)


def truncated(matrix: Matrix, weight: Tensor, log: dict[str, float]) -> Truncation:
    """The best approximations of a weight at every rank, in the metric of its data, and of the loss if it is read."""
    root = None
    if matrix.outputs is not None:
        root = partial(cholesky, matrix.outputs, f"gradients of {matrix.name}", log)
    return truncation(weight, matrix.inputs, root)


class LowRankFamily(Family):
    """B A, truncated in closed form.

    Args:
        log: of jitters.
    """

    name, factors = "low-rank", 2

    def __init__(self, log: dict[str, float]) -> None:
        self.log = log

    def options(self, matrix: Matrix, rule: str, shares: Sequence[float] | None, width: int) -> list[Option]:
        shape = (matrix.weight.shape[0], matrix.weight.shape[1])
        found, cut = {}, truncated(matrix, matrix.weight, self.log)
        for share in SHARES if shares is None else shares:
            rank = rank_within(shape, share * matrix.weight.numel() * width, width)
            if rank < 1:
                continue
            left, right = cut.factors(rank, matrix.weight)
            size = part_bytes({"kind": "low-rank", "rank": rank}, [shape], width)
            found[rank] = Option((matrix.member,), self.name, size, matrix.cost(rule, left @ right), {"rank": rank})
        return list(found.values())

    def fit(self, matrix: Matrix, option: Option) -> list[Fit]:
        cut = truncated(matrix, matrix.weight, self.log)
        return [low_rank_fit(matrix.member, *cut.factors(int(option.settings["rank"]), matrix.weight))]

    def configs(self, option: Option) -> list[dict[str, Any]]:
        return [{"kind": "low-rank", "rank": option.settings["rank"]}]


class LowRankSparse(Family):
    """``B A + S``: in turn the best S for what B A leaves over, and the best B A for what S leaves over.

    Args:
        score, compensation: of :mod:`masa.compression.methods.pruning`, for S.
        rounds: of these turns, for what was chosen.
        log: of jitters.
    """

    name, factors = "low-rank+sparse", 2

    def __init__(self, score: str, compensation: str, rounds: int, log: dict[str, float]) -> None:
        self.score, self.compensation, self.rounds, self.log = score, compensation, rounds, log

    def options(self, matrix: Matrix, rule: str, shares: Sequence[float] | None, width: int) -> list[Option]:
        shape = (matrix.weight.shape[0], matrix.weight.shape[1])
        found, cut = [], truncated(matrix, matrix.weight, self.log)
        bits = part_bytes({"kind": "sparse", "count": 0}, [shape], width)
        for share in SHARES if shares is None else shares:
            for part in RANK_SHARES:
                budget = int(share * matrix.weight.numel() * width)
                rank = rank_within(shape, part * budget, width)
                low = part_bytes({"kind": "low-rank", "rank": rank}, [shape], width)
                count = (budget - low - bits) // width
                if rank < 1 or count < 1:
                    continue
                left, right = cut.factors(rank, matrix.weight)
                rest = replace(matrix, weight=matrix.weight - left @ right)
                sparse = rest.weight * keep(score(rest, self.score), count, "matrix")
                cost = matrix.error_cost(rule, rest.weight - sparse)
                settings = {"rank": rank, "count": count}
                found.append(Option((matrix.member,), self.name, low + bits + count * width, cost, settings))
        return found

    def fit(self, matrix: Matrix, option: Option) -> list[Fit]:
        rank, count = int(option.settings["rank"]), int(option.settings["count"])
        rule = "whitened" if matrix.outputs is None else "loss"
        left, right = truncated(matrix, matrix.weight, self.log).factors(rank, matrix.weight)
        best: tuple[float, Tensor, Tensor, Tensor, Tensor] | None = None
        for _ in range(max(1, self.rounds)):
            rest = replace(matrix, weight=matrix.weight - left @ right)
            mask = keep(score(rest, self.score), count, "matrix")
            sparse = compensated(rest, mask, self.compensation, self.log)
            error = matrix.cost(rule, left @ right + sparse)
            if best is not None and not error < best[0]:
                break
            best = error, left, right, sparse, mask
            over = matrix.weight - sparse
            left, right = truncated(matrix, over, self.log).factors(rank, over)
        assert best is not None
        _, left, right, sparse, mask = best
        return [low_rank_fit(matrix.member, left, right), sparse_fit(matrix.member, sparse, mask)]

    def configs(self, option: Option) -> list[dict[str, Any]]:
        low, count = {"kind": "low-rank", "rank": option.settings["rank"]}, option.settings["count"]
        return [low, {"kind": "sparse", "count": count}]


def rank_within(shape: tuple[int, int], budget: float, width: int) -> int:
    """The largest rank whose factors take at most ``budget`` bytes."""
    return min(int(budget // (width * sum(shape))), *shape)


@register("low-rank-sparse")
class LowRankSparseCompressor(ByteCompressor):
    """A low-rank part and a sparse one for every matrix, fitted in the metric of the data.

    Args:
        cost, allocation, bits: of :class:`~masa.compression.methods.equal_bytes.ByteCompressor`.
        score, compensation, rounds: of :class:`LowRankSparse`.
    """

    def __init__(
        self,
        cost: str = "whitened",
        allocation: str = "global",
        score: str = "wanda",
        compensation: str = "exact",
        rounds: int = 3,
        bits: Sequence[int] | None = None,
    ) -> None:
        super().__init__(cost, allocation, bits)
        self.score, self.compensation, self.rounds = score, compensation, rounds

    def needs_loss(self) -> bool:
        return self.cost.startswith("loss") or "loss" in (self.score, self.compensation)

    def families(self, log: dict[str, float]) -> list[Family]:
        return [LowRankSparse(self.score, self.compensation, self.rounds, log)]


@register("low-rank-sparse-fisher")
class LowRankSparseFisher(LowRankSparseCompressor):
    """The same in the metric of the loss (ours). Needs a calibration with gradients.

    Args:
        cost, allocation, bits: of :class:`~masa.compression.methods.equal_bytes.ByteCompressor`.
        score, compensation, rounds: of :class:`LowRankSparse`.
    """

    __init__ = partialmethod(LowRankSparseCompressor.__init__, cost="loss", score="loss")
