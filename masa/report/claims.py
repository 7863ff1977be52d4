"""What the paper claims, each judged by one rule: ``claims.*``.

A claim is a contrast of experiments, e.g. MASA-QKVO less low-rank, whose weights add up to zero. Its estimate is the
weighted sum of the experiments' means over seeds, counted so that above zero is in the claim's favour. It holds if the
whole 95 % interval is above minus the claim's margin, does not hold if the whole interval is below, and cannot be
decided otherwise. The interval is Student's, of two variances added up:

- of training again: the residual variance of one training beside its experiment and its seed, pooled over all
  experiments that were trained with the same seeds (what a seed does to all of them alike cancels in a contrast). It is
  taken to be the same for all of them; ``error_own_seeds`` is the contrast's error by its own seeds alone, to compare;
- of other text: the paired differences of documents, each weighted by its tokens.

Degrees of freedom are Satterthwaite's. Where neither can be had, nothing is decided. Intervals are each claim's own: of
twenty, one may well miss.
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

from masa.errors import MasaError
from masa.report import metrics as m
from masa.report.tables import write_files

LEVEL = 0.95
ROUNDING = 1e-9
"""Standard errors below it are no noise but rounding."""
LOSS, PERPLEXITY = "validation_loss", "held_out_ppl"
"""What is known document by document; perplexities are compared by their logarithms, in nats a token."""
HOLDS, FAILS, OPEN, ABSENT = "holds", "does not hold", "not decidable here", "not run here"


@dataclass(frozen=True)
class Variance:
    """A variance of the estimate and its degrees of freedom."""

    value: float
    freedom: float


@dataclass(frozen=True)
class Judged:
    """An estimate in favour of a claim, its interval, and what follows."""

    gain: float
    low: float | None
    high: float | None
    verdict: str


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
    return Judged(gain, low, high, HOLDS if low > -margin else FAILS if high < -margin else OPEN)


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


def of_documents(differences: Sequence[float], tokens: Sequence[int]) -> Variance | None:
    """Variance of a mean over documents, each weighted by its tokens, of which another sample could have been taken.

    Unbiased where a document's variance falls with its tokens; otherwise right for many documents.
    """
    total = sum(tokens)
    weights = [t / total for t in tokens]
    if len(differences) < 2 or max(weights) == 1:
        return None
    mean = sum(d * w for d, w in zip(differences, weights, strict=True))
    spread = sum((w * (d - mean)) ** 2 / (1 - w) for d, w in zip(differences, weights, strict=True))
    return Variance(spread, 1 / sum(w * w for w in weights) - 1)


def row(claim: Mapping[str, Any], results: Path) -> dict[str, Any]:
    """One claim at one scale, judged."""
    kept = {k: claim[k] for k in ("claim", "source", "scale", "metric", "contrast", "margin")}
    if claim["records"] is None:
        return kept | {"verdict": ABSENT}
    loaded = {name: [m.load(results, r) for r in records] for name, records in claim["records"].items()}
    metric = next(x for x in m.METRICS if x.name == claim["metric"])
    sign = -1.0 if metric.better == "lower" else 1.0
    weights, seeds = claim["weights"], len(next(iter(loaded.values())))

    def value(record: Mapping[str, Any]) -> float:
        number = m.flatten(record)[metric.name]
        return math.log(number) if metric.name == PERPLEXITY else number

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
    documents = _by_document(loaded, weights) if metric.name in (LOSS, PERPLEXITY) else None
    if documents and (other := of_documents(*documents)) and (variances or not claim["trained"]):
        variances.append(other)
        errors["error_documents"] = math.sqrt(other.value)
    judged = judge(gain, variances, claim["margin"])
    return (
        kept
        | {
            "seeds": seeds,
            "gain": judged.gain,
            "low": judged.low,
            "high": judged.high,
            "verdict": judged.verdict,
        }
        | errors
    )


def _by_document(
    loaded: Mapping[str, Sequence[Mapping[str, Any]]], weights: Mapping[str, float]
) -> tuple[list[float], list[int]] | None:
    """The contrast of every document, over seeds, in nats a token; and its tokens."""
    first = next(iter(loaded.values()))[0]
    tokens = first["corpus"].get("tokens_by_document")
    if tokens is None:
        raise MasaError(f"The evaluation of {first['run']} was made before claims were judged; make it anew.")
    contrast = [0.0] * len(tokens)
    for name, weight in weights.items():
        for record in loaded[name]:
            corpus = record["corpus"]
            losses = corpus.get("loss_by_document") or [
                nll / count for nll, count in zip(corpus["nll_by_document"], tokens, strict=True)
            ]
            for i, loss in enumerate(losses):
                contrast[i] += weight * loss / len(loaded[name])
    return contrast, tokens


def write(claims: Sequence[Mapping[str, Any]], results: Path, folder: Path) -> None:
    """``claims.*``: one row a claim and scale (:func:`masa.claims.spec`)."""
    rows = [row(claim, results) for claim in claims]
    frame = pd.DataFrame(rows).reindex(
        columns=[
            "claim", "source", "scale", "metric", "contrast", "margin", "seeds", "gain", "low", "high", "verdict",
            "error_seeds", "error_own_seeds", "error_documents",
        ]
    )  # fmt: skip
    shown = pd.DataFrame(
        {
            "Claim": frame["claim"],
            "Paper": frame["source"],
            "At": frame["scale"],
            "Measured": [f"{c} ({x})" for c, x in zip(frame["contrast"], frame["metric"], strict=True)],
            "Seeds": ["" if pd.isna(n) else f"{n:.0f}" for n in frame["seeds"]],
            "Gain [95 %]": [_interval(r) for _, r in frame.iterrows()],
            "Verdict": frame["verdict"],
        }
    )
    note = (
        "Gain: above zero is in the claim's favour, in the unit of what is measured (perplexities: nats a token); of a "
        "loss it is minus the difference that is written. A claim holds if the whole interval is above minus its "
        "margin, does not hold if all of it is below, and is not decidable otherwise. The interval is of this claim "
        "alone, not of all at once. It covers training again with other seeds (with one seed, by the noise of the "
        "experiments which have several) and, for losses on text, other documents, taken as independent; not other "
        "test images, nor, of compressions, other calibration text."
    )
    write_files(frame, shown, {"name": "claims", "title": "Claims of the paper, judged by one rule"}, folder, note)


def _interval(row: Mapping[str, Any]) -> str:
    if pd.isna(row["gain"]):
        return ""
    if pd.isna(row["low"]):
        return f"{row['gain']:+.4f}"
    margin = f", margin {row['margin']:g}" if row["margin"] else ""
    return f"{row['gain']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]{margin}"
