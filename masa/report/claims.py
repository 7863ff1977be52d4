"""What the paper claims, each judged by one rule: ``claims.*``.

A claim is a contrast of experiments, e.g. MASA-QKVO less low-rank, whose weights add up to zero. Its estimate is the
weighted sum of the experiments' means over seeds, counted so that above zero is in the claim's favour. It holds if the
whole 95 % interval is above minus the claim's margin, does not hold if the whole interval is below, is equal if neither
and the 90 % interval lies within the claim's margins of equality, and cannot be decided otherwise
(:mod:`masa.report.rule`). The interval is Student's, of two variances added up:

- of training again: the residual variance of one training beside its experiment and its seed, pooled over all
  experiments that were trained with the same seeds (what a seed does to all of them alike cancels in a contrast). It is
  taken to be the same for all of them; ``error_own_seeds`` is the contrast's error by its own seeds alone, to compare;
- of other data: the paired differences of held-out documents, each weighted by its tokens, or of test images.

Degrees of freedom are Satterthwaite's. Where neither can be had, nothing is decided. Intervals and verdicts are each
claim's own: of twenty, one may well miss. ``p_holm`` is for those who ask all claims of a table at once (Holm, 1979,
which needs no independence; of all tests of difference and of equality): below 0.05 the verdict stands even so. Where a
claim with margins of equality is not decidable, ``seeds_needed`` says how many it takes to find two methods without any
difference equal four times of five, the held-out text being what it is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from masa.evaluation import metrics as m
from masa.report import examples, power
from masa.report.rule import ABSENT, EQUAL, OPEN, Variance, holm, judge, of_examples, of_seeds
from masa.report.tables import write_files
from masa.study import claims as asked

PERPLEXITIES = ("held_out_ppl", "wikitext_token_ppl")
"""They are compared by their logarithms, in nats a token."""
COLUMNS = [
    "claim", "source", "scale", "metric", "contrast", "margin", "equal_within", "seeds", "seeds_needed", "gain", "low",
    "high", "verdict", "error_seeds", "error_own_seeds", "error_examples", "p", "p_equal", "p_holm",
]  # fmt: skip


def missing(claim: Mapping[str, Any], results: Path) -> list[str]:
    """The records that judging a claim would read and that are not there."""
    return [record for record in asked.records(claim) if not (results / record / "metrics.json").is_file()]


def row(claim: Mapping[str, Any], results: Path) -> dict[str, Any]:
    """One claim at one scale, judged; not so if a record of it is missing."""
    kept = {k: claim[k] for k in ("claim", "source", "scale", "metric", "contrast", "margin", "equal_within")}
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
    variances, errors, other = [], {}, None
    if claim["trained"] and seeds > 1:
        own = [sum(w * value(loaded[name][i]) for name, w in weights.items()) for i in range(seeds)]
        errors["error_own_seeds"] = statistics.stdev(own) / math.sqrt(seeds)
    trained = {name: [value(m.load(results, r)) for r in records] for name, records in claim["noise"].items()}
    noise = of_seeds(trained) if trained else None
    if noise:
        factor = sum(weight**2 for weight in weights.values()) / seeds
        variances.append(Variance(noise.value * factor, noise.freedom))
        errors["error_seeds"] = math.sqrt(variances[0].value)
    paired = _by_example(metric.name, loaded, weights)
    if paired and (other := of_examples(*paired)) and (variances or not claim["trained"]):
        variances.append(other)
        errors["error_examples"] = math.sqrt(other.value)
    judged = judge(gain, variances, claim["margin"], claim["equal_within"])
    if judged.verdict == OPEN and noise and claim["equal_within"]:
        once = variances[0].value * seeds
        errors["seeds_needed"] = _needed(claim["equal_within"], once, len(trained), other.value if other else 0.0)
    return (
        kept
        | {
            "seeds": seeds,
            "gain": judged.gain,
            "low": judged.low,
            "high": judged.high,
            "verdict": judged.verdict,
            "p": judged.p,
            "p_equal": judged.p_equal,
        }
        | errors
    )


def _needed(within: float, once: float, methods: int, fixed: float) -> float:
    """Seeds to find equality; infinity where the noise of the held-out text alone is too large.

    Args:
        once: variance of the contrast of one seed.
        methods: whose noise is pooled.
        fixed: variance of the contrast by other data.
    """

    def chance(error: float, freedom: float) -> float:
        return power.equal(within, math.hypot(error, math.sqrt(fixed)), freedom)

    return power.seeds_needed(chance, math.sqrt(once), methods) or math.inf


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
    frame["p_holm"] = _all_at_once(frame)
    shown = pd.DataFrame(
        {
            "Claim": frame["claim"],
            "Paper": frame["source"],
            "At": frame["scale"],
            "Measured": [f"{c} ({x})" for c, x in zip(frame["contrast"], frame["metric"], strict=True)],
            "Seeds": [_seeds(n, needed) for n, needed in zip(frame["seeds"], frame["seeds_needed"], strict=True)],
            "Gain [95 %]": [interval(r) for _, r in frame.iterrows()],
            "Verdict": [
                f"{v} within {w:g}" if v == EQUAL else v
                for v, w in zip(frame["verdict"], frame["equal_within"], strict=True)
            ],
            "p (Holm)": ["" if pd.isna(p) else probability(p) for p in frame["p_holm"]],
        }
    )
    note = (
        "Gain: above zero is in the claim's favour, in the unit of what is measured (perplexities: nats a token); of a "
        "loss it is minus the difference that is written. A claim holds if the whole interval is above minus its "
        "margin, does not hold if all of it is below, is equal where neither and two one-sided tests at 5 % put the "
        "difference within the margins, and is not decidable otherwise; of those, Seeds says how many it would take "
        "to find no difference equal four times of five. The interval is of this claim alone, not of all at once. It "
        "covers training again with other seeds (with one seed, by the noise of the experiments which have several) "
        "and other held-out documents or test images, taken as independent; not, of compressions, other calibration "
        "text. p (Holm): for all tests of the table at once; below 0.05 the verdict stands even so."
    )
    if lacking:
        parts = dict.fromkeys(record.rpartition("/")[0] for record in lacking)
        note += f" Not judged for want of measurements in {', '.join(parts)}."
    write_files(frame, shown, {"name": "claims", "title": "Claims of the paper, judged by one rule"}, folder, note)


def _all_at_once(frame: pd.DataFrame) -> list[float | None]:
    """Holm's value of the test that each verdict rests on, among all tests of the table."""
    tests = [(i, name) for name in ("p", "p_equal") for i in frame.index if not pd.isna(frame.loc[i, name])]
    adjusted = dict(zip(tests, holm([float(frame.loc[test]) for test in tests]), strict=True))
    verdicts = zip(frame.index, frame["verdict"], strict=True)
    return [adjusted.get((i, "p_equal" if verdict == EQUAL else "p")) for i, verdict in verdicts]


def _seeds(there: float, needed: float) -> str:
    """``3``, or ``3 of 17`` where a verdict would take that many; empty where none were trained."""
    if pd.isna(there):
        return ""
    return f"{there:.0f}" if pd.isna(needed) else f"{there:.0f} of {'∞' if math.isinf(needed) else f'{needed:.0f}'}"


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
