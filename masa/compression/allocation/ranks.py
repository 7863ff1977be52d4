"""How many ranks each matrix gets under one parameter budget.

An allocator sees, for every matrix, its shape and its squared singular values in the metric of the data, and returns
a rank for each, or None for a matrix that stays dense. All spend the budget to the last affordable rank and never
exceed it. A matrix without any energy does nothing (a layer of zeros, inputs of zeros, outputs that nothing reads): it
gets rank 0, and what it leaves goes to the others.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from masa.errors import MasaError, unknown

Key = tuple[str, tuple[int, ...]]
"""(projection letter, the layers that the matrix serves)."""


class Spectrum(Protocol):
    """What an allocator reads of a matrix: ``shape`` (out, in), ``energy`` (k,) descending, ``total`` their scale."""

    shape: tuple[int, int]
    energy: Tensor
    total: float


class RankAllocator:
    """Base of the rules in :data:`RANKS`, which :meth:`share_out` a budget among matrices that do something."""

    def allocate(self, spectra: Mapping[Key, Spectrum], budget: int, least: int = 1) -> dict[Key, int | None]:
        """Ranks whose factors hold at most ``budget`` numbers.

        Args:
            spectra: of all matrices.
            budget: numbers to spend.
            least: rank that every matrix that does something gets at least: 1, or 0 for a residual.

        Returns:
            A rank for each, in the order of ``spectra``, or None for a matrix that stays dense. All do where there is
            room for it, as matrices that do nothing may leave it.

        Raises:
            MasaError: the budget is too small; the message gives the reachable reduction.
        """
        live = {key: spectrum for key, spectrum in spectra.items() if does_something(spectrum)}
        self.check(spectra, budget, least)
        if budget >= sum(map(dense_numbers, live.values())):
            return {key: None if key in live else 0 for key in spectra}
        ranks = self.share_out(live, budget, least)
        return {key: ranks.get(key, 0) for key in spectra}

    def share_out(self, spectra: Mapping[Key, Spectrum], budget: int, least: int) -> dict[Key, int | None]:
        """As :meth:`allocate`, of matrices that do something and cannot all stay dense."""
        raise NotImplementedError

    def check(self, spectra: Mapping[Key, Spectrum], budget: int, least: int) -> None:
        """Raise if the least ranks are out of reach."""
        needed = least * sum(per_rank(spectrum) for spectrum in spectra.values() if does_something(spectrum))
        dense = sum(map(dense_numbers, spectra.values()))
        if needed > budget:
            raise MasaError(
                f"A budget of {budget} numbers leaves a matrix without any rank: one rank for every matrix takes "
                f"{needed}, so that reductions of 0 to {1 - needed / dense:.2%} are reachable. Ask for a smaller one."
            )


def does_something(spectrum: Spectrum) -> bool:
    """Whether leaving the matrix out would be an error at all."""
    return bool(spectrum.energy.any())


def per_rank(spectrum: Spectrum) -> int:
    """Numbers that one rank stores: out + in."""
    return sum(spectrum.shape)


def dense_numbers(spectrum: Spectrum) -> int:
    return spectrum.shape[0] * spectrum.shape[1]


def stored(spectra: Mapping[Key, Spectrum], ranks: Mapping[Key, int | None]) -> int:
    """Numbers that these ranks store."""
    return sum(
        dense_numbers(spectra[key]) if rank is None else rank * per_rank(spectra[key]) for key, rank in ranks.items()
    )


class RoleRanks(RankAllocator):
    """A fixed fraction of every matrix, larger for q and o than for k and v ("adaptive", as the paper words it).

    Each matrix gets ``r = floor(keep * out * in / (out + in))`` with keep(q, o) = ratio * keep(k, v); what rounding
    leaves over goes out one rank at a time, in the order of the layers. The ratio is ours: the paper gives none.
    """

    def __init__(self, ratio: float = 1.8) -> None:
        if not ratio > 0:
            raise MasaError(f"The ratio of ranks between q, o and k, v must be positive, got {ratio}.")
        self.ratio = ratio

    def share_out(self, spectra: Mapping[Key, Spectrum], budget: int, least: int) -> dict[Key, int | None]:
        limits = {key: dense_numbers(s) / per_rank(s) for key, s in spectra.items()}  # ranks that cost as much as dense

        def ranks_at(keep: float) -> dict[Key, int | None]:
            return {
                key: max(least, min(int(keep * (self.ratio if key[0] in "qo" else 1) * limit), int(limit)))
                for key, limit in limits.items()
            }

        low, high = 0.0, max(1.0, 1 / self.ratio)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if stored(spectra, ranks_at(middle)) <= budget else (low, middle)
        ranks = ranks_at(low)
        left = budget - stored(spectra, ranks)
        for key, spectrum in spectra.items():
            if ranks[key] + 1 <= limits[key] and per_rank(spectrum) <= left:  # type: ignore[operator]
                ranks[key] += 1  # type: ignore[operator]
                left -= per_rank(spectrum)
        return ranks


class UniformRanks(RoleRanks):
    """The same fraction of every matrix (SVD-LLM, Wang et al. 2024): ``r = floor(keep * out * in / (out + in))``."""

    def __init__(self) -> None:
        super().__init__(ratio=1.0)


class GlobalRanks(RankAllocator):
    """All matrices compete for one budget (ours): minimise the sum of their relative output errors.

    Matrix k at rank r has the error ``tail_k(r) / total_k`` and costs ``(out + in) r`` numbers. For a price lambda the
    best rank of each is found by itself, ``argmin_r tail_k(r) / total_k + lambda * cost_k(r)``, and lambda is bisected
    until the budget is met; what is left over buys the best affordable ranks one at a time.

    Args:
        dense: let a matrix stay as it is, at out * in numbers and no error. A rank above out * in / (out + in) costs
            more than that.
    """

    def __init__(self, dense: bool = True) -> None:
        self.dense = dense

    def share_out(self, spectra: Mapping[Key, Spectrum], budget: int, least: int) -> dict[Key, int | None]:
        errors = {key: _relative(s) for key, s in spectra.items()}

        def ranks_at(price: float) -> dict[Key, int | None]:
            return {key: self._best(errors[key], spectra[key], price, least) for key in spectra}

        low, high = math.log(1e-300), 0.0  # logarithms; at 1 per number no rank pays, and all have the least
        for _ in range(60):
            middle = (low + high) / 2
            fits = stored(spectra, ranks_at(math.exp(middle))) <= budget
            low, high = (low, middle) if fits else (middle, high)
        ranks = ranks_at(math.exp(high))
        self._spend(ranks, errors, spectra, budget - stored(spectra, ranks))
        return ranks

    def _best(self, energy: Tensor, spectrum: Spectrum, price: float, least: int) -> int | None:
        cost = per_rank(spectrum)
        rank = max(least, int((energy > price * cost).sum()))
        tail = float(energy[rank:].sum())
        if self.dense and price * dense_numbers(spectrum) < tail + price * cost * rank:
            return None
        return rank

    def _spend(
        self, ranks: dict[Key, int | None], errors: Mapping[Key, Tensor], spectra: Mapping[Key, Spectrum], left: int
    ) -> None:
        heap: list[tuple[float, int, Key]] = []

        def offer(order: int, key: Key) -> None:
            rank, cost = ranks[key], per_rank(spectra[key])
            if rank is None or rank >= len(errors[key]) or float(errors[key][rank]) <= 0:
                return
            if not self.dense or (rank + 1) * cost < dense_numbers(spectra[key]):
                heapq.heappush(heap, (-float(errors[key][rank]) / cost, order, key))

        for order, key in enumerate(ranks):
            offer(order, key)
        while heap:
            _, order, key = heapq.heappop(heap)
            if per_rank(spectra[key]) <= left:
                ranks[key] += 1  # type: ignore[operator]
                left -= per_rank(spectra[key])
                offer(order, key)


def _relative(spectrum: Spectrum) -> Tensor:
    """Energies over their scale; rounding noise is no error worth a rank."""
    energy = spectrum.energy.double().cpu()
    scale = spectrum.total if spectrum.total > 0 else 1.0
    return torch.where(energy > 1e-14 * scale, energy / scale, 0.0)


RANKS: dict[str, Any] = {
    "uniform": UniformRanks,
    "role": RoleRanks,
    "global": lambda: GlobalRanks(dense=False),
    "global-dense": GlobalRanks,
}


def make_ranks(rule: str | Mapping[str, Any]) -> RankAllocator:
    """Build an allocator from its name, or from ``{"rule": name, ...arguments}``."""
    if not isinstance(rule, str | Mapping):
        raise MasaError(f"Ranks are a rule, {', '.join(RANKS)}, or a mapping with one (rule), not {rule!r}.")
    arguments = {"rule": rule} if isinstance(rule, str) else dict(rule)
    name = arguments.pop("rule", None)
    if name not in RANKS:
        raise unknown("Rank rule", name, RANKS)
    try:
        return RANKS[name](**arguments)
    except TypeError as error:
        raise MasaError(f"Rank rule {name!r}: {error}") from error
