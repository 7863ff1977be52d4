"""Options whose numbers are stored with few bits, beside those in the dtype of the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from masa.compression.allocation.bytes import Option
from masa.compression.methods.fits import dense_fit, part_bytes
from masa.compression.methods.matrices import Matrix
from masa.compression.methods.rounding import Rounding
from masa.errors import MasaError
from masa.sharing.grouped import BITS, bits_stored

AS_IT_IS = 16
"""Among bits: the dtype of the model, whatever it has."""


def check(bits: Sequence[int] | None) -> None:
    """Raise :class:`MasaError` unless these are bits that numbers can have."""
    known = (AS_IT_IS, *BITS)
    if bits is None:
        return
    if isinstance(bits, int | str) or not bits or any(b not in known or isinstance(b, bool) for b in bits):
        raise MasaError(
            f"bits is a list of {', '.join(map(str, known))} (the dtype of the model, or fewer), got {bits!r}."
        )


def fewer(bits: Sequence[int] | None) -> list[int]:
    """Those that are not the dtype of the model."""
    return [b for b in bits or () if b != AS_IT_IS]


def wider(shares: Sequence[float], bits: Sequence[int] | None, width: int) -> list[float]:
    """The shares of a matrix's bytes that options in the model's dtype may take so that they fit with few bits."""
    few, positions = fewer(bits), 1 / (8 * width)  # a bit beside every number
    room = [width * 8 / bits_stored(b) for b in few]
    more: set[float] = set()
    for share, times in itertools.product(shares, room):
        most, least = share * times, (share - positions) * times + positions
        more |= {0.998 * most, 0.998 * (most + least) / 2, 0.998 * least}  # without positions, of factors, of it all
    return [*(shares if not few or AS_IT_IS in (bits or ()) else ()), *sorted(s for s in more if 0 < s < 1)]


def noise(matrix: Matrix, rule: str, bits: int, log: dict[str, float]) -> float:
    """What it costs to round all of a matrix, with what makes up for it."""
    (fit,) = Rounding([matrix], bits, log).fits([dense_fit(matrix.member, matrix.weight)])
    return matrix.cost(rule, fit.tensors["weight"])


def added(
    options: Sequence[Option],
    matrices: Sequence[Matrix],
    of: Callable[[Option], tuple[Sequence[Mapping[str, Any]], int]],
    rule: str,
    bits: Sequence[int],
    log: dict[str, float],
    width: int,
) -> list[Option]:
    """Options with few bits, after the same in the dtype of the model where that may be.

    Args:
        options: in the dtype of the model.
        matrices: their members.
        of: option -> the parts that it stores, and how many factors of a product are rounded.
        rule: of the costs.
        bits: that may be.
        log: receives jitters.
        width: bytes of a number of the model.
    """
    found = list(options) if AS_IT_IS in bits else []
    shapes = [(m.weight.shape[0], m.weight.shape[1]) for m in matrices]
    for few in fewer(bits):
        lost = [noise(matrix, rule, few, log) for matrix in matrices]
        for whole in options:
            configs, factors = of(whole)
            found.append(_rounded(whole, configs, shapes, factors, lost, few, rule, width))
    return found


def _rounded(
    whole: Option,
    configs: Sequence[Mapping[str, Any]],
    shapes: Sequence[tuple[int, int]],
    factors: int,
    lost: Sequence[float],
    bits: int,
    rule: str,
    width: int,
) -> Option:
    """An option with few bits; errors of rounding are independent of those that it has already, so that they add up.

    Args:
        whole: the same in the dtype of the model.
        configs: of the parts that it stores, of members of these (out, in).
        factors: of a product: each adds what rounding the matrix itself costs.
        lost: :func:`noise` of every member.
        width: bytes of a number of the model.
    """
    size = sum(part_bytes({**config, "bits": bits}, shapes, width) for config in configs)
    if rule == "weights":  # a norm, not its square
        cost = (whole.cost**2 + factors * sum(n**2 for n in lost)) ** 0.5
    else:
        cost = whole.cost + factors * sum(lost)
    return replace(whole, size=size, cost=cost, settings={**whole.settings, "bits": bits})
