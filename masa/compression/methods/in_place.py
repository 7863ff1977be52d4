"""Methods that prune in place: a bitmap and the values that stay, the control that papers on dictionaries leave out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, partialmethod
from typing import Any

import torch

from masa.compression.allocation.bytes import Option
from masa.compression.base import Problem, register
from masa.compression.methods.compressed_inputs import fits_on_compressed_inputs
from masa.compression.methods.equal_bytes import ByteCompressor, Family
from masa.compression.methods.fits import Fit, part_bytes, sparse_fit
from masa.compression.methods.matrices import Matrix
from masa.compression.methods.pruning import compensated, eliminate, keep, keep_two_of_four, score
from masa.errors import unknown

SCOPES = ("rows", "matrix")
GRID = 64


class InPlace(Family):
    """Entries that stay where they are.

    Args:
        score: of :data:`~masa.compression.methods.pruning.SCORES`.
        scope: whether entries compete in each row, or in the whole matrix.
        compensation: of :data:`~masa.compression.methods.pruning.COMPENSATIONS`.
        own: let SparseGPT's elimination choose the entries on its way.
        log: of jitters.
    """

    name = "sparse"

    def __init__(self, score: str, scope: str, compensation: str, own: bool, log: dict[str, float]) -> None:
        if scope not in SCOPES:
            raise unknown("scope", scope, SCOPES)
        self.score, self.scope, self.compensation, self.own, self.log = score, scope, compensation, own, log

    def options(self, matrix: Matrix, rule: str, shares: Sequence[float] | None, width: int) -> list[Option]:
        shape = (matrix.weight.shape[0], matrix.weight.shape[1])
        total = matrix.weight.numel()
        bits = part_bytes({"kind": "sparse", "count": 0}, [shape], width)
        if shares is None:
            counts = [total * step // GRID for step in range(1, GRID)]
        else:
            counts = [min(total, int((share * total * width - bits) // width)) for share in shares]
        removed = self._removed(matrix, rule, [n for n in counts if n > 0])
        return [
            Option((matrix.member,), self.name, bits + n * width, cost, {"count": n}) for n, cost in removed.items()
        ]

    def _removed(self, matrix: Matrix, rule: str, counts: Sequence[int]) -> dict[int, float]:
        """Count that stays -> cost of what goes, each entry by itself: no entry makes up for another."""
        values, entries = score(matrix, self.score), matrix.entries(rule)
        found = {}
        if self.scope == "matrix":
            order = values.flatten().argsort(descending=True)
            tail = entries.flatten()[order].flip(0).cumsum(0).flip(0)
            found = {n: float(tail[n]) if n < len(tail) else 0.0 for n in counts}
        else:
            ranked = entries.gather(1, values.argsort(1, descending=True))
            tail = torch.nn.functional.pad(ranked.sum(0).flip(0).cumsum(0).flip(0), (0, 1))
            for n in counts:
                each, rest = divmod(n, len(entries))
                part = rest / len(entries)
                found[n] = float(tail[each] * (1 - part) + (tail[each + 1] * part if part else 0.0))
        return {n: cost**0.5 if rule == "weights" else cost for n, cost in found.items()}

    def fit(self, matrix: Matrix, option: Option) -> list[Fit]:
        count = int(option.settings["count"])
        if self.own:
            weight, mask = eliminate(matrix, None, self.log, count / matrix.weight.numel())
            if (extra := int(mask.sum()) - count) > 0:  # rounding of the blocks
                mask &= ~keep(torch.where(mask, -weight.square(), -torch.inf), extra, "matrix")
        else:
            mask = keep(score(matrix, self.score), count, self.scope)
            weight = compensated(matrix, mask, self.compensation, self.log)
        return [sparse_fit(matrix.member, weight, mask)]

    def configs(self, option: Option) -> list[dict[str, Any]]:
        return [{"kind": "sparse", "count": option.settings["count"]}]


class TwoOfFour(Family):
    """Two of every four neighbours stay, the pattern that sparse tensor cores multiply by; one size only."""

    name = "sparse-2:4"

    def __init__(self, score: str, compensation: str, log: dict[str, float]) -> None:
        self.score, self.compensation, self.log = score, compensation, log

    def options(self, matrix: Matrix, rule: str, shares: Sequence[float] | None, width: int) -> list[Option]:
        mask = keep_two_of_four(score(matrix, self.score))
        shape = (matrix.weight.shape[0], matrix.weight.shape[1])
        size = part_bytes({"kind": "sparse", "count": int(mask.sum())}, [shape], width)
        cost = float((matrix.entries(rule) * ~mask).sum())
        cost = cost**0.5 if rule == "weights" else cost
        return [Option((matrix.member,), self.name, size, cost, {"count": int(mask.sum())})]

    def fit(self, matrix: Matrix, option: Option) -> list[Fit]:
        if self.compensation == "columns":
            weight, mask = eliminate(matrix, None, self.log, pattern=True)
        else:
            mask = keep_two_of_four(score(matrix, self.score))
            weight = compensated(matrix, mask, self.compensation, self.log)
        return [sparse_fit(matrix.member, weight, mask)]

    def configs(self, option: Option) -> list[dict[str, Any]]:
        return [{"kind": "sparse", "count": option.settings["count"]}]


class SparseInPlace(ByteCompressor):
    """Base: every matrix keeps some of its entries where they are.

    Args:
        cost, allocation, bits: of :class:`~masa.compression.methods.equal_bytes.ByteCompressor`.
        score, scope, compensation: of :class:`InPlace`.
    """

    def __init__(
        self, cost: str, allocation: str, score: str, scope: str, compensation: str, bits: Sequence[int] | None = None
    ) -> None:
        super().__init__(cost, allocation, bits)
        self.score, self.scope, self.compensation = score, scope, compensation

    def needs_loss(self) -> bool:
        return self.cost.startswith("loss") or "loss" in (self.score, self.compensation)

    def families(self, log: dict[str, float]) -> list[Family]:
        return [InPlace(self.score, self.scope, self.compensation, False, log)]


@register("sparse-magnitude")
class SparseMagnitude(SparseInPlace):
    """The largest entries of every matrix stay, blind to the data: the floor.

    Args:
        cost, allocation, score, scope, compensation, bits: of :class:`SparseInPlace`.
    """

    needs_calibration = False

    __init__ = partialmethod(
        SparseInPlace.__init__,
        cost="weights",
        allocation="uniform",
        score="magnitude",
        scope="matrix",
        compensation="none",
    )


@register("sparse-wanda")
class SparseWanda(SparseInPlace):
    """Entries by ``|w| ||x||`` in each row, the same share of every matrix (Sun et al. 2023, arXiv 2306.11695).

    Args:
        cost, allocation, score, scope, compensation, bits: of :class:`SparseInPlace`.
    """

    __init__ = partialmethod(
        SparseInPlace.__init__,
        cost="whitened",
        allocation="uniform",
        score="wanda",
        scope="rows",
        compensation="none",
    )


@register("sparse-gpt")
class SparseGpt(ByteCompressor):
    """Column by column, the columns after each make up for it (Frantar and Alistarh 2023, arXiv 2301.00774).

    Args:
        cost, allocation, bits: of :class:`~masa.compression.methods.equal_bytes.ByteCompressor`.
    """

    def __init__(self, cost: str = "whitened", allocation: str = "uniform", bits: Sequence[int] | None = None) -> None:
        super().__init__(cost, allocation, bits)

    def families(self, log: dict[str, float]) -> list[Family]:
        return [InPlace("wanda", "matrix", "columns", True, log)]


@register("sparse-2-4")
class SparseTwoOfFour(ByteCompressor):
    """Two of every four neighbours stay, or the matrix does; SparseGPT's compensation.

    Args:
        cost, allocation, bits: of :class:`~masa.compression.methods.equal_bytes.ByteCompressor`.
        score, compensation: of :class:`TwoOfFour`.
    """

    def __init__(
        self,
        cost: str = "whitened",
        allocation: str = "global",
        score: str = "wanda",
        compensation: str = "columns",
        bits: Sequence[int] | None = None,
    ) -> None:
        super().__init__(cost, allocation, bits)
        self.score, self.compensation = score, compensation

    def families(self, log: dict[str, float]) -> list[Family]:
        return [TwoOfFour(self.score, self.compensation, log)]


@register("sparse-fisher")
class SparseFisher(SparseInPlace):
    """Entries by what the loss minds of them, w^2 E[x^2] E[g^2]; one threshold for the whole model (ours).

    The entries that stay make up for those that go, in the metric of the loss. Needs a calibration with gradients.

    Args:
        cost, allocation, score, scope, compensation, bits: of :class:`SparseInPlace`.
    """

    __init__ = partialmethod(
        SparseInPlace.__init__,
        cost="loss",
        allocation="global",
        score="loss",
        scope="matrix",
        compensation="loss",
    )


@register("sparse-fisher-update")
class SparseFisherUpdate(SparseFisher):
    """:class:`SparseFisher`, layer by layer on the inputs that the pruned layers before produce.

    Args:
        cost, allocation, score, scope, compensation, bits: of :class:`SparseInPlace`.
        samples: sequences of the calibration's tokens that this runs over; None for all.
    """

    needs_tokens = True

    def __init__(
        self,
        cost: str = "loss",
        allocation: str = "global",
        score: str = "loss",
        scope: str = "matrix",
        compensation: str = "loss",
        samples: int | None = None,
        bits: Sequence[int] | None = None,
    ) -> None:
        SparseInPlace.__init__(self, cost, allocation, score, scope, compensation, bits)
        self.samples = samples

    def fits(self, problem: Problem, chosen: Sequence[Option]) -> list[Fit]:
        return fits_on_compressed_inputs(problem, chosen, partial(self.solved, problem), self.samples)
