"""How many seeds it takes: what training again changes, and what that many seeds can and cannot show.

Two questions are asked of a difference between two methods that are trained with the same seeds: whether it is there (a
two-sided test at 5 %), and whether the two are equal within a margin (two one-sided tests at 5 %, Schuirmann, 1987,
which is a 90 % interval inside of the margins). Power is the chance that the answer comes where it is true; of the
second where there is no difference at all. Held-out text is taken as given: more seeds do not make it longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from masa.report.rule import of_seeds
from masa.report.tables import write_files
from masa.runs import run

LEVEL = 0.05
POWER = 0.8
KEYS = {"validation_loss": "", "validation_loss_last_weights": ", before averaging"}
"""Losses at the end of a training -> what is said of them: of one that averages its weights both are known."""
MOST = 10_000
"""Seeds beyond which nobody would go."""
DIFFERENCE, MARGIN = 0.005, 0.01
"""In nats a token: what is to be shown, and within what two methods count as equal."""


def shown(difference: float, error: float, freedom: float) -> float:
    """Chance that a two-sided test at 5 % sees a difference.

    Args:
        difference: the true one.
        error: standard error of its estimate.
        freedom: degrees of freedom of that.
    """
    limit, away = stats.t.isf(LEVEL / 2, freedom) * _estimated(freedom), difference / error
    return float(np.mean(stats.norm.sf(limit - away) + stats.norm.cdf(-limit - away)))


def equal(margin: float, error: float, freedom: float) -> float:
    """Chance that two methods without any difference are found equal within a margin."""
    inside = margin / error - stats.t.isf(LEVEL, freedom) * _estimated(freedom)
    return float(np.mean(np.maximum(0.0, 2 * stats.norm.cdf(inside) - 1)))


def _estimated(freedom: float) -> np.ndarray:
    """Estimated over true standard error: equally likely values of sqrt(chi² / freedom)."""
    return np.sqrt(stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, freedom) / freedom)


def seeds_needed(chance: Callable[[float, float], float], deviation: float, methods: int = 2) -> int | None:
    """The fewest seeds with a power of 80 %; None where 10,000 are not enough.

    Args:
        chance: of a standard error and its degrees of freedom.
        deviation: standard deviation of a paired difference of one seed.
        methods: trained with the same seeds, whose noise is pooled: (methods - 1)(seeds - 1) degrees of freedom.
    """

    def enough(seeds: int) -> bool:
        return chance(deviation / math.sqrt(seeds), (methods - 1) * (seeds - 1)) >= POWER

    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
        if low >= MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def smallest(error: float, freedom: float) -> float:
    """The difference that is seen with a power of 80 %."""
    low, high = 0.0, 1e3 * error
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if shown(middle, error, freedom) >= POWER else (middle, high)
    return high


def row(deviation: float, seeds: int, methods: int) -> dict[str, Any]:
    """What a standard deviation of paired differences means, for :data:`DIFFERENCE` and :data:`MARGIN`."""
    freedom = (methods - 1) * (seeds - 1)
    return {
        "seeds": seeds,
        "deviation": deviation,
        "visible": smallest(deviation / math.sqrt(seeds), freedom),
        "seeds_to_show": seeds_needed(lambda e, f: shown(DIFFERENCE, e, f), deviation, methods),
        "seeds_to_equal": seeds_needed(lambda e, f: equal(MARGIN, e, f), deviation, methods),
    }


def rows(losses: Mapping[str, Sequence[float]], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """All methods together, all but each, and each beside the first.

    Args:
        losses: method -> held-out loss of each seed, the same seeds for all.
    """
    seeds, found = len(next(iter(losses.values()))), []

    def pooled(names: Sequence[str], said: str) -> None:
        noise = of_seeds({name: losses[name] for name in names})
        if noise is not None and noise.value > 0:
            found.append({"of": said, **row(math.sqrt(2 * noise.value), seeds, len(names))})

    pooled(list(losses), f"all {len(losses)}, pooled")
    if len(losses) > 2:
        for left in losses:
            pooled([name for name in losses if name != left], f"all but {labels[left]}")
    first = next(iter(losses))
    for name in list(losses)[1:]:
        pooled([first, name], f"{labels[name]} less {labels[first]}")
    return found


def write(spec: Sequence[Mapping[str, Any]], results: Path, folder: Path) -> None:
    """``power.*``: of every scale with several seeds (:func:`masa.study.claims.power_spec`)."""
    made = []
    for scale in spec:
        for key, said in KEYS.items():
            losses = {
                name: [_loss(results / "runs" / run_id / "manifest.json", key) for run_id in runs]
                for name, runs in scale["runs"].items()
            }
            losses = {name: values for name, values in losses.items() if None not in values}
            if len(losses) > 1:
                made += [{"scale": scale["scale"] + said, **found} for found in rows(losses, scale["labels"])]
    if not made:
        made = [{"scale": "", "of": "no two methods have several seeds"}]
    columns = ["scale", "of", "seeds", "deviation", "visible", "seeds_to_show", "seeds_to_equal"]
    frame = pd.DataFrame(made, columns=columns)
    shown_frame = pd.DataFrame(
        {
            "At": frame["scale"],
            "Noise of": frame["of"],
            "Seeds": ["" if pd.isna(n) else f"{n:.0f}" for n in frame["seeds"]],
            "Deviation of a difference": ["" if pd.isna(x) else f"{x:.4f}" for x in frame["deviation"]],
            "Visible at these seeds": ["" if pd.isna(x) else f"{x:.4f}" for x in frame["visible"]],
            f"Seeds for {DIFFERENCE:g}": _seeds(frame, "seeds_to_show"),
            f"Seeds for equal within {MARGIN:g}": _seeds(frame, "seeds_to_equal"),
        }
    )
    note = (
        "Held-out loss, nats a token. Deviation: of the difference between two trainings with the same seed, method "
        "and seed taken off. Visible: the difference that these seeds show four times of five (two-sided, 5 %). Seeds "
        f"for {DIFFERENCE:g}: how many it takes to show such a difference as often; for equal within {MARGIN:g}: to "
        "find two methods without any difference equal as often, by two one-sided tests. Held-out text is taken as "
        "given."
    )
    write_files(frame, shown_frame, {"name": "power", "title": "How many seeds it takes"}, folder, note)


def _seeds(frame: pd.DataFrame, column: str) -> list[str]:
    """How many, as the table prints them; nothing where there is no noise to go by."""
    cells = zip(frame[column], frame["deviation"], strict=True)
    return ["" if pd.isna(d) else f"> {MOST:,}" if pd.isna(n) else f"{n:.0f}" for n, d in cells]


def _loss(manifest: Path, key: str) -> float | None:
    """Held-out loss at the end of a training; None of a model that has none."""
    return run.read_json(manifest, "masa pretrain")["training"].get(key)
