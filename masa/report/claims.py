"""What the paper claims, each judged by one rule: ``claims.*``.

A claim is a contrast of experiments, e.g. MASA-QKVO less low-rank, whose weights add up to zero. Its estimate is the
weighted sum of the experiments' means over seeds, counted so that above zero is in the claim's favour. It holds if the
whole 95 % interval is above minus the claim's margin, does not hold if the whole interval is below, and cannot be
decided otherwise. The interval is Student's, of two variances added up:

- of training again: the residual variance of one training beside its experiment and its seed, pooled over all
  experiments that were trained with the same seeds (what a seed does to all of them alike cancels in a contrast). It is
  taken to be the same for all of them; ``error_own_seeds`` is the contrast's error by its own seeds alone, to compare;
- of other data: the paired differences of held-out documents, each weighted by its tokens, or of test images.

Degrees of freedom are Satterthwaite's. Where neither can be had, nothing is decided. Intervals and verdicts are each
claim's own: of twenty, one may well miss. ``p_holm`` is for those who ask all claims of a table at once (Holm, 1979,
which needs no independence): below 0.05 the verdict stands even so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from masa.evaluation import metrics as m
from masa.report import examples
from masa.report.tables import write_files
from masa.study import claims as asked

LEVEL = 0.95
ROUNDING = 1e-9
"""Standard errors below it are no noise but rounding."""
PERPLEXITIES = ("held_out_ppl", "wikitext_token_ppl")
"""They are compared by their logarithms, in nats a token."""
COLUMNS = [
    "claim", "source", "scale", "metric", "contrast", "margin", "seeds", "gain", "low", "high", "verdict",
    "error_seeds", "error_own_seeds", "error_examples", "p", "p_holm",
]  # fmt: skip
HOLDS, FAILS, OPEN, ABSENT = "holds", "does not hold", "not decidable here", "not run here"


@dataclass(frozen=True)
class Variance:
    """A variance of the estimate and its degrees of freedom."""

    value: float
    freedom: float


@dataclass(frozen=True)
class Judged:
    """An estimate in favour of a claim, its interval, what follows, and how likely so large a gain is by chance.

    ``p`` is two-sided, of a gain of minus the margin: below 0.05 if and only if the interval decides.
    """

    gain: float
    low: float | None
    high: float | None
    verdict: str
    p: float | None = None


def judge(gain: float, variances: Sequence[Variance], margin: float) -> Judged:
    """The rule.

    Args:
        gain: estimate, above zero in the claim's favour.
        variances: independent parts of its variance; none: it cannot be decided.
        margin: how much worse still counts, at least 0; of "at least as good" claims.
    """
    total = sum(v.value for v in variances)
    if total < ROUNDING**2:  # no noise was seen, which does not mean that there is none
        return Judged(gain, None, None, OPEN)
    freedom = total**2 / sum(v.value**2 / v.freedom for v in variances)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(total)
    low, high = gain - half, gain + half
    p = 2 * float(stats.t.sf(abs(gain + margin) / math.sqrt(total), freedom))
    return Judged(gain, low, high, HOLDS if low > -margin else FAILS if high < -margin else OPEN, p)


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


def missing(claim: Mapping[str, Any], results: Path) -> list[str]:
    """The records that judging a claim would read and that are not there."""
    return [record for record in asked.records(claim) if not (results / record / "metrics.json").is_file()]


def row(claim: Mapping[str, Any], results: Path) -> dict[str, Any]:
    """One claim at one scale, judged; not so if a record of it is missing."""
    kept = {k: claim[k] for k in ("claim", "source", "scale", "metric", "contrast", "margin")}
    if claim["records"] is None or missing(claim, results):
        return kept | {"verdict": ABSENT}
    loaded = {name: [m.load(results, r) for r in records] for name, records in claim["records"].items()}
    metric = next(x for x in m.METRICS if x.name == claim["metric"])
    if any(metric.name not in m.flatten(record) for records in loaded.values() for record in records):
        return kept | {"verdict": ABSENT}  # an optional text that could not be had
    sign = -1.0 if metric.better == "lower" else 1.0
    weights, seeds = claim["weights"], len(next(iter(loaded.values())))

    def value(record: Mapping[str, Any]) -> float:
        number = m.flatten(record)[metric.name]
        return math.log(number) if metric.name in PERPLEXITIES else number

    gain = sign * sum(weight * statistics.fmean(map(value, loaded[name])) for name, weight in weights.items())
    variances, errors = [], {}
    if claim["trained"] and seeds > 1:
        own = [sum(w * value(loaded[name][i]) for name, w in weights.items()) for i in range(seeds)]
        errors["error_own_seeds"] = statistics.stdev(own) / math.sqrt(seeds)
    trained = {name: [value(m.load(results, r)) for r in records] for name, records in claim["noise"].items()}
    if trained and (noise := of_seeds(trained)):
        factor = sum(weight**2 for weight in weights.values()) / seeds
        variances.append(Variance(noise.value * factor, noise.freedom))
        errors["error_seeds"] = math.sqrt(variances[0].value)
    paired = _by_example(metric.name, loaded, weights)
    if paired and (other := of_examples(*paired)) and (variances or not claim["trained"]):
        variances.append(other)
        errors["error_examples"] = math.sqrt(other.value)
    judged = judge(gain, variances, claim["margin"])
    return (
        kept
        | {
            "seeds": seeds,
            "gain": judged.gain,
            "low": judged.low,
            "high": judged.high,
            "verdict": judged.verdict,
            "p": judged.p,
        }
        | errors
    )


def _by_example(
    metric: str, loaded: Mapping[str, Sequence[Mapping[str, Any]]], weights: Mapping[str, float]
) -> tuple[list[float], list[int]] | None:
    """The contrast of every example, over seeds; and its weight."""
    contrast: list[float] = []
    sizes: list[int] = []
    for name, weight in weights.items():
        for record in loaded[name]:
            found = examples.scores(metric, record)
            if found is None:
                return None
            contrast, sizes = contrast or [0.0] * len(found[1]), found[1]
            for i, score in enumerate(found[0]):
                contrast[i] += weight * score / len(loaded[name])
    return contrast, sizes


def write(claims: Sequence[Mapping[str, Any]], results: Path, folder: Path) -> None:
    """``claims.*``: one row a claim and scale (:func:`masa.study.claims.spec`).

    Raises:
        MasaError: there are claims to judge, but of none all records are there.
    """
    rows = [row(claim, results) for claim in claims]
    lacking = [record for claim in claims for record in missing(claim, results)]
    if lacking and not any("gain" in judged for judged in rows):
        m.load(results, lacking[0])  # raises, and says how to mend it
    frame = pd.DataFrame(rows).reindex(columns=COLUMNS)
    tested = frame["p"].notna()
    frame.loc[tested, "p_holm"] = holm(frame.loc[tested, "p"].tolist())
    shown = pd.DataFrame(
        {
            "Claim": frame["claim"],
            "Paper": frame["source"],
            "At": frame["scale"],
            "Measured": [f"{c} ({x})" for c, x in zip(frame["contrast"], frame["metric"], strict=True)],
            "Seeds": ["" if pd.isna(n) else f"{n:.0f}" for n in frame["seeds"]],
            "Gain [95 %]": [interval(r) for _, r in frame.iterrows()],
            "Verdict": frame["verdict"],
            "p (Holm)": ["" if pd.isna(p) else probability(p) for p in frame["p_holm"]],
        }
    )
    note = (
        "Gain: above zero is in the claim's favour, in the unit of what is measured (perplexities: nats a token); of a "
        "loss it is minus the difference that is written. A claim holds if the whole interval is above minus its "
        "margin, does not hold if all of it is below, and is not decidable otherwise. The interval is of this claim "
        "alone, not of all at once. It covers training again with other seeds (with one seed, by the noise of the "
        "experiments which have several) and other held-out documents or test images, taken as independent; not, of "
        "compressions, other calibration text. p (Holm): for all claims of the table at once; below 0.05 the verdict "
        "stands even so."
    )
    if lacking:
        parts = dict.fromkeys(record.rpartition("/")[0] for record in lacking)
        note += f" Not judged for want of measurements in {', '.join(parts)}."
    write_files(frame, shown, {"name": "claims", "title": "Claims of the paper, judged by one rule"}, folder, note)


def probability(p: float) -> str:
    """A p-value as tables print it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def interval(row: Mapping[str, Any]) -> str:
    """A judged claim's gain, its interval and its margin, as tables print them; empty where it was not run."""
    if pd.isna(row["gain"]):
        return ""
    if pd.isna(row["low"]):
        return f"{row['gain']:+.4f}"
    margin = f", margin {row['margin']:g}" if row["margin"] else ""
    return f"{row['gain']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]{margin}"
