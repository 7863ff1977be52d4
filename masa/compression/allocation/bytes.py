"""One budget in bytes for all matrices: each takes one of its options, whatever kind of storage that is.

Minimising the sum of the costs under a budget is a multiple-choice knapsack. For a price a byte every matrix decides by
itself; the price is bisected until the budget is met, and what is left over buys the best affordable improvements. The
result is the optimum of the relaxed problem but for one step of one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from masa.errors import MasaError

Member = tuple[str, int]
"""(projection letter, layer)."""


@dataclass(frozen=True)
class Option:
    """One way to store one matrix, or several together.

    Attributes:
        members: the matrices that it stores.
        kind: which family of options made it.
        size: bytes, positions included.
        cost: what it does to the model; all options of one allocation are measured alike.
        settings: what the family needs to solve for it.
    """

    members: tuple[Member, ...]
    kind: str
    size: int
    cost: float
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Unit:
    """Matrices whose options exclude each other: one matrix, or a group that may be stored together.

    Attributes:
        singles: options of each member by itself.
        joint: options that store all members; none for a matrix by itself.
    """

    singles: list[list[Option]]
    joint: list[Option] = field(default_factory=list)

    def best(self, price: float) -> list[Option]:
        """The options with the least ``cost + price * size``."""
        apart = [min(options, key=lambda o: (o.cost + price * o.size, o.size)) for options in self.singles]
        if self.joint:
            one = min(self.joint, key=lambda o: (o.cost + price * o.size, o.size))
            if one.cost + price * one.size < sum(o.cost + price * o.size for o in apart):
                return [one]
        return apart

    def least(self) -> int:
        """Bytes that the members take at least."""
        apart = sum(min(o.size for o in options) for options in self.singles)
        return min([apart, *(o.size for o in self.joint)])


def allocate(units: Sequence[Unit], budget: int, dense: int) -> list[Option]:
    """The options with the least summed cost whose sizes sum to at most ``budget`` bytes.

    Args:
        units: of all matrices.
        budget, dense: bytes to spend, and of the uncompressed matrices.

    Raises:
        MasaError: the least options take more; the message gives what is in reach.
    """
    least = sum(unit.least() for unit in units)
    if least > budget:
        raise MasaError(
            f"A budget of {max(budget, 0):,} bytes is out of reach: these options store at least {least:,} of "
            f"{dense:,} bytes, so that reductions of 0 to {max(0.0, 1 - least / dense):.2%} are in reach. Ask for a "
            "smaller one, or take another method."
        )
    low, high = math.log(1e-40), math.log(1e40)
    for _ in range(120):
        middle = (low + high) / 2
        size = sum(o.size for unit in units for o in unit.best(math.exp(middle)))
        low, high = (low, middle) if size <= budget else (middle, high)
    chosen = [unit.best(math.exp(high)) for unit in units]
    _spend(units, chosen, budget)
    return [option for found in chosen for option in found]


def _spend(units: Sequence[Unit], chosen: list[list[Option]], budget: int) -> None:
    """Exchange options, the most saved a byte first, as long as an exchange that lowers the cost is affordable."""
    left = budget - sum(o.size for found in chosen for o in found)
    if left < 0:  # no price met the budget; the least options do
        for i, unit in enumerate(units):
            apart = [min(options, key=lambda o: o.size) for options in unit.singles]
            joint = min(unit.joint, key=lambda o: o.size, default=None)
            chosen[i] = [joint] if joint and joint.size < sum(o.size for o in apart) else apart
        left = budget - sum(o.size for found in chosen for o in found)
    while True:
        best: tuple[float, int, int, Option] | None = None
        for i, (unit, found) in enumerate(zip(units, chosen, strict=True)):
            for j, now in enumerate(found):
                for other in unit.joint if now in unit.joint else unit.singles[j]:
                    extra, saved = other.size - now.size, now.cost - other.cost
                    if saved > 0 and extra <= left:
                        rate = saved / extra if extra > 0 else math.inf
                        if best is None or rate > best[0]:
                            best = rate, i, j, other
        if best is None:
            return
        _, i, j, option = best
        left -= option.size - chosen[i][j].size
        chosen[i][j] = option


def uniform(units: Sequence[Unit], budget: int, dense: int) -> list[Option]:
    """The best option of each matrix within its own share of the budget, ``budget / dense`` of its bytes.

    Units hold options that were made for this share, and each matrix as it is; what can be stored together is.

    Raises:
        MasaError: a matrix has none.
    """
    chosen, keep = [], budget / max(dense, 1)
    for unit in units:
        if unit.joint and keep < 1:
            chosen.append(min(unit.joint, key=lambda o: (o.cost, o.size)))
            continue
        for options in unit.singles:
            if not options[0].size:  # nothing to store
                chosen.append(options[0])
                continue
            whole = max(o.size for o in options if o.kind == "dense")
            within = [o for o in options if o.size <= keep * whole]
            if not within:
                needed = max(min(o.size for o in options) / whole for u in units for options in u.singles)
                raise MasaError(
                    f"A budget of {max(budget, 0):,} bytes leaves a matrix without any option: reductions of 0 to "
                    f"{max(0.0, 1 - needed):.2%} are in reach. Ask for a smaller one, or take another method."
                )
            chosen.append(min(within, key=lambda o: (o.cost, o.size)))
    return chosen
