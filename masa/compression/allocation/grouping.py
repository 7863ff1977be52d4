"""Groups of consecutive layers, from the KL drift between the outputs of neighbouring blocks.

``drift[l]`` is ``KL(p_l || p_l+1)``: a boundary between layers l and l + 1 is good where it is large. Every rule
returns a partition of 0 .. L-1 into runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from masa.errors import MasaError, unknown

Groups = list[list[int]]


def fixed(drift: Sequence[float], size: int = 5) -> Groups:
    """Runs of ``size`` layers whatever the drift; the last may be shorter."""
    layers = len(drift) + 1
    if size < 1:
        raise MasaError(f"A group needs at least one layer, got size = {size}.")
    return [list(range(start, min(start + size, layers))) for start in range(0, layers, size)]


def top_k(drift: Sequence[float], groups: int | None = None) -> Groups:
    """Cut at the ``groups - 1`` largest drifts (groups of one layer are common); by default L / 5 groups."""
    groups = _count(drift, groups)
    cuts = sorted(sorted(range(len(drift)), key=lambda i: (-drift[i], i))[: groups - 1])
    return _runs(cuts, len(drift) + 1)


def greedy(drift: Sequence[float], limit: float = 0.5) -> Groups:
    """Go on with a group until the drift summed within it would exceed ``limit``."""
    cuts, total = [], 0.0
    for i, value in enumerate(drift):
        total += value
        if total > limit:
            cuts.append(i)
            total = 0.0
    return _runs(cuts, len(drift) + 1)


def optimal(
    drift: Sequence[float], groups: int | None = None, min_size: int | None = None, max_size: int | None = None
) -> Groups:
    """The partition into ``groups`` runs of bounded size with the least drift inside them (ours, exact).

    Dynamic programming over (layers used, groups used), O(L * groups * max_size). Equally good partitions: the most
    even one. By default L / 5 groups of 2 layers (of one where there is no other) to twice the average.
    """
    groups = _count(drift, groups)
    layers = len(drift) + 1
    min_size = min(2, layers) if min_size is None else min_size
    max_size = math.ceil(2 * layers / groups) if max_size is None else max_size
    if not 1 <= min_size <= max_size or not groups * min_size <= layers <= groups * max_size:
        raise MasaError(
            f"{layers} layers cannot be split into {groups} groups of {min_size} to {max_size} layers. Choose groups "
            f"between {math.ceil(layers / max(max_size, 1))} and {layers // max(min_size, 1)}, or other sizes."
        )
    inside = [0.0]
    for value in drift:
        inside.append(inside[-1] + value)
    best: list[dict[int, tuple[float, int, int]]] = [{0: (0.0, 0, 0)}]  # groups used -> end -> (drift, squares, start)
    for _ in range(groups):
        row: dict[int, tuple[float, int, int]] = {}
        for start, (cost, squares, _) in best[-1].items():
            for end in range(start + min_size, min(start + max_size, layers) + 1):
                candidate = (cost + inside[end - 1] - inside[start], squares + (end - start) ** 2, start)
                if end not in row or candidate < row[end]:
                    row[end] = candidate
        best.append(row)
    cuts, end = [], layers
    for row in reversed(best[2:]):
        end = row[end][2]
        cuts.append(end - 1)
    return _runs(sorted(cuts), layers)


def _count(drift: Sequence[float], groups: int | None) -> int:
    groups = max(1, round((len(drift) + 1) / 5)) if groups is None else groups
    if not 1 <= groups <= len(drift) + 1:
        raise MasaError(f"groups = {groups} must lie between 1 and the number of layers, {len(drift) + 1}.")
    return groups


def _runs(cuts: Sequence[int], layers: int) -> Groups:
    edges = [0, *(cut + 1 for cut in cuts), layers]
    return [list(range(a, b)) for a, b in itertools.pairwise(edges)]


GROUPINGS: dict[str, Callable[..., Groups]] = {"fixed": fixed, "top-k": top_k, "greedy": greedy, "optimal": optimal}


def make_groups(rule: str | Mapping[str, Any], drift: Sequence[float]) -> Groups:
    """Apply a rule of :data:`GROUPINGS`, given by its name or as ``{"rule": name, ...arguments}``."""
    arguments = {"rule": rule} if isinstance(rule, str) else dict(rule)
    name = arguments.pop("rule", None)
    if name not in GROUPINGS:
        raise unknown("Grouping rule", name, GROUPINGS)
    try:
        return GROUPINGS[name](drift, **arguments)
    except TypeError as error:
        raise MasaError(f"Grouping rule {name!r}: {error}") from error
