"""Whether the methods' gaps to the first row open or close as training goes on: one run's curve, in its own unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from masa.errors import MasaError
from masa.evaluation import metrics as m
from masa.report.canvas import Canvas
from masa.report.curve import at, by_scale, curve
from masa.report.labels import End
from masa.report.rule import Variance, judge, of_seeds
from masa.report.style import TEXT, look
from masa.runs import run

APART = 1.025
"""Factor between neighbouring methods' bars, which would hide one another at the same place."""


def gap(spec: Mapping[str, Any], results: Path) -> Figure:
    """Held-out loss less the first row's at the same seed and token, over tokens a parameter of the first row.

    Bars at about 1, 2, 5, 10, … tokens a parameter, and at the end: 95 % intervals of the difference, each by itself,
    from the residual variance of all rows over seeds (:func:`masa.report.rule.of_seeds`) and of no other text.

    Raises:
        MasaError: a log or the first run's manifest is missing or damaged.
    """
    scales = by_scale(spec["rows"])
    canvas = Canvas(TEXT, 2.6 * len(scales), len(scales))
    seeds = len(spec["rows"][0]["runs"])
    for axis, (scale, rows) in zip(canvas.axes[:, 0], scales.items(), strict=True):
        logs = {row["experiment"]: [curve(results, run_id, "tokens") for run_id in row["runs"]] for row in rows}
        seen = sorted(set.intersection(*(set(log) for of_one in logs.values() for log in of_one)))
        x = np.array(seen) / _parameters(m.below(results / "runs", rows[0]["runs"][0]) / "manifest.json")
        losses = {name: np.array([[log[t] for t in seen] for log in of_one]) for name, of_one in logs.items()}
        chosen = budgets(x)
        half = [half_interval({name: values[:, i] for name, values in losses.items()}) for i in chosen]
        axis.axhline(0, **look(rows[0]["experiment"]) | {"marker": ""}, linewidth=0.8)
        ends = [End(x[-1], 0.0, rows[0]["label"], look(rows[0]["experiment"])["color"])]
        for i, row in enumerate(rows[1:]):
            mean = (losses[row["experiment"]] - losses[rows[0]["experiment"]]).mean(0)
            style, aside = look(row["experiment"]), APART ** (i - (len(rows) - 2) / 2)
            axis.plot(x, mean, **style | {"marker": ""}, linewidth=0.9)
            error = half if None not in half else None
            axis.errorbar(
                x[chosen] * aside, mean[chosen], error, **style | {"linestyle": ""}, capsize=1.5, elinewidth=0.8
            )
            ends.append(End(x[-1], mean[-1], row["label"], style["color"]))
        canvas.label_ends(axis, ends)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(x[chosen]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axis.set_xlabel(f"Training tokens a parameter of {rows[0]['label']}")
        axis.set_ylabel(f"Held-out loss less {rows[0]['label']}'s\n(nats/token)")
        if len(scales) > 1:
            axis.set_title(scale)
    said = (
        f"Mean over {seeds} seeds, bars: 95 % intervals of each difference alone, by all methods' noise over seeds."
        if seeds > 1
        else "One seed; no error bars."
    )
    return canvas.finish(spec["title"], said, at(scales))


def _parameters(manifest: Path) -> int:
    """How many parameters the model of a finished run has."""
    try:
        return int(run.read_json(manifest, "masa pretrain")["parameters"]["total"])
    except (KeyError, TypeError, ValueError) as error:
        raise MasaError(
            f"{manifest} says no `parameters.total` ({type(error).__name__}: {error}); delete it and finish the run "
            "with `masa pretrain`."
        ) from error


def budgets(x: Sequence[float]) -> list[int]:
    """Indices of the values that are nearest to 1, 2 and 5 times powers of ten within their range, and of the last.

    One that is within a tenth of the last is left out: their labels would cover one another.
    """
    x = np.asarray(x)
    low, high = math.floor(math.log10(x[0])), math.ceil(math.log10(x[-1]))
    wanted = [first * 10.0**power for power in range(low, high + 1) for first in (1, 2, 5)]
    nearest = {int(np.abs(x - value).argmin()) for value in wanted if 0.95 * x[0] <= value <= 1.05 * x[-1]}
    return sorted({i for i in nearest if x[i] < 0.9 * x[-1]} | {len(x) - 1})


def half_interval(values: Mapping[str, Sequence[float]]) -> float | None:
    """Half of the interval of the difference of two means; None where no noise over seeds is seen."""
    noise = of_seeds({name: list(of_one) for name, of_one in values.items()})
    if noise is None:
        return None
    seeds = len(next(iter(values.values())))
    return judge(0.0, [Variance(2 * noise.value / seeds, noise.freedom)], 0.0).high
