"""The rule by which differences are judged: noise, interval, verdict, and many claims at once.

A contrast's interval is Student's, of two variances added up, of training again and of other data, with Satterthwaite's
degrees of freedom. A claim holds if the whole 95 % interval is above minus its margin, does not hold if the whole
interval is below. One that neither decides is *equal* if the 90 % interval lies within the two margins of equality: two
one-sided tests at 5 % (Schuirmann, 1987).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95
ROUNDING = 1e-9
"""Standard errors below it are no noise but rounding."""
HOLDS, FAILS, EQUAL, OPEN, ABSENT = "holds", "does not hold", "equal", "not decidable here", "not run here"


@dataclass(frozen=True)
class Variance:
    """A variance of the estimate and its degrees of freedom."""

    value: float
    freedom: float


@dataclass(frozen=True)
class Judged:
    """An estimate in favour of a claim, its interval, what follows, and how likely so large a gain is by chance.

    ``p`` is two-sided, of a gain of minus the margin: below 0.05 if and only if the interval decides. ``p_equal`` is
    the larger of the two one-sided ones: below 0.05 if and only if the 90 % interval lies within the margins of
    equality; None where a claim has none.
    """

    gain: float
    low: float | None
    high: float | None
    verdict: str
    p: float | None = None
    p_equal: float | None = None


def judge(gain: float, variances: Sequence[Variance], margin: float, equal_within: float = 0.0) -> Judged:
    """The rule.

    Args:
        gain: estimate, above zero in the claim's favour.
        variances: independent parts of its variance; none: it cannot be decided.
        margin: how much worse still counts, at least 0; of "at least as good" claims.
        equal_within: how far from zero, both ways, still counts as equal; 0: it is not asked.
    """
    total = sum(v.value for v in variances)
    if total < ROUNDING**2:  # no noise was seen, which does not mean that there is none
        return Judged(gain, None, None, OPEN)
    freedom = total**2 / sum(v.value**2 / v.freedom for v in variances)
    error = math.sqrt(total)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    low, high = gain - half, gain + half
    p = 2 * float(stats.t.sf(abs(gain + margin) / error, freedom))
    p_equal = float(stats.t.sf((equal_within - abs(gain)) / error, freedom)) if equal_within else None
    decided = HOLDS if low > -margin else FAILS if high < -margin else None
    equal = p_equal is not None and p_equal < 1 - LEVEL
    return Judged(gain, low, high, decided or (EQUAL if equal else OPEN), p, p_equal)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: all claims whose value is below a level are decided at that level.

    Args:
        p: p-values of all claims that are asked at once.
    """
    adjusted, least = [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = least
    return adjusted


def of_seeds(values: Mapping[str, Sequence[float]]) -> Variance | None:
    """Residual variance of one training in the additive model experiment + seed.

    Args:
        values: experiment -> its values, all for the same seeds in the same order.

    Returns:
        None where there are fewer than two experiments or two seeds.
    """
    seeds = len(next(iter(values.values()), ()))
    if len(values) < 2 or seeds < 2:
        return None
    freedom = (len(values) - 1) * (seeds - 1)
    of_seed = [statistics.fmean(column) for column in zip(*values.values(), strict=True)]
    mean = statistics.fmean(of_seed)
    rest = sum(
        (value - statistics.fmean(row) - of_seed[i] + mean) ** 2
        for row in values.values()
        for i, value in enumerate(row)
    )
    return Variance(rest / freedom, freedom)


def of_examples(differences: Sequence[float], sizes: Sequence[int]) -> Variance | None:
    """Variance of a mean over examples of which another sample could have been taken.

    Unbiased where an example's variance falls with its size; otherwise right for many examples.

    Args:
        differences: paired differences of documents or images.
        sizes: their weights: tokens, or 1 each.
    """
    total = sum(sizes)
    weights = [size / total for size in sizes]
    if len(differences) < 2 or max(weights) == 1:
        return None
    mean = sum(d * w for d, w in zip(differences, weights, strict=True))
    spread = sum((w * (d - mean)) ** 2 / (1 - w) for d, w in zip(differences, weights, strict=True))
    return Variance(spread, 1 / sum(w * w for w in weights) - 1)
