"""Runs side by side: what differs in how they were made, their numbers, and the differences to the first of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from masa.evaluation import metrics as m
from masa.report.runs import COMPRESSION, Run
from masa.runs.files import whole_file

_COUNTS = ("parameters", "attention_parameters", "attn_cr_pct", "model_cr_pct")
_SAID_BEFORE = ("provenance.seed", "provenance.threads")
HEADINGS = {metric.name: metric for metric in m.METRICS} | {
    metric.name: metric
    for metric in (
        m.Metric("steps", "Steps", 0),
        m.Metric("trained_on", "Trained on ({unit})", 0),
        m.Metric("training_loss", "Training loss, last line", 4, "lower"),
        m.Metric("held_out_loss", "Held-out loss in training, last", 4, "lower"),
        m.Metric("training_loss_at", "Training loss at {training_loss_at:,} {unit}", 4, "lower"),
        m.Metric("held_out_loss_at", "Held-out loss at {held_out_loss_at:,} {unit}", 4, "lower"),
        m.Metric("per_second", "{Unit}/s in training", 0, "higher"),
        m.Metric("training_hours", "Training (h)", 3),
    )
}
"""Column -> heading; where ``*_at`` is the largest number of tokens or images that all runs have a line for."""


@dataclass(frozen=True)
class Paired:
    """Difference of one group to the first, over the seeds that both have: mean, standard deviation and number."""

    group: str
    base: str
    metric: str
    mean: float
    std: float | None
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """Some runs, compared.

    Attributes:
        runs: in the order in which they were named; differences are to the first.
        differs: dotted key of the specs and of the provenance -> value of each run, where they are not all the same;
            None where a run does not have the key.
        at: "training_loss_at", "held_out_loss_at" -> tokens or images that all runs have come to; absent if none.
        numbers: column -> value of each run; None where it has none.
        paired: over seeds, where there are several.
    """

    runs: tuple[Run, ...]
    differs: Mapping[str, Sequence[Any]]
    at: Mapping[str, int]
    numbers: Mapping[str, Sequence[float | None]]
    paired: tuple[Paired, ...]

    def differences(self, column: str) -> list[float | None]:
        """Each run's value less the first one's; none between losses at different points of training."""
        values = self.numbers[column]
        if not self.comparable(column):
            return [None] * len(values)
        return [None if v is None or values[0] is None else v - values[0] for v in values]

    def comparable(self, column: str) -> bool:
        """Whether the values of all runs are of the same point of training; else there may be a column ``*_at``."""
        return _comparable(column, self.at, self.numbers)

    def pairs(self, index: int) -> bool:
        """Whether a run had the seed and data of the first: chance that is common to both leaves the difference."""
        one, first = self.runs[index], self.runs[0]
        return one.seed is not None and one.seed == first.seed and _same_data(one, first) is True

    def heading(self, column: str) -> str:
        """Of a table."""
        unit = self.runs[0].unit
        return HEADINGS[column].label.format(unit=unit, Unit=unit.capitalize(), **self.at)

    def frame(self) -> pd.DataFrame:
        """One row a run: its id, the keys that differ, all numbers, and ``*_minus_first``."""
        columns: dict[str, Sequence[Any]] = {
            "run": [r.name for r in self.runs],
            "directory": [str(r.directory) for r in self.runs],
            "group": [r.group for r in self.runs],
            "seed": [r.seed for r in self.runs],
            "done": [r.done for r in self.runs],
        }
        columns |= {f"spec.{k}": [_plain(v) for v in values] for k, values in self.differs.items()}
        columns |= {f"{column}_{self.runs[0].unit}": [at] * len(self.runs) for column, at in self.at.items()}
        columns |= self.numbers
        columns |= {f"{column}_minus_first": self.differences(column) for column in self.numbers}
        return pd.DataFrame(columns)

    def as_json(self) -> str:
        """All of it."""
        data = {
            "runs": [
                {"run": r.name, "directory": str(r.directory), "seed": r.seed, "done": r.done, "paired": self.pairs(i)}
                for i, r in enumerate(self.runs)
            ],
            "unit": self.runs[0].unit,
            "at": self.at,
            "differs": self.differs,
            "numbers": {k: {"values": v, "minus_first": self.differences(k)} for k, v in self.numbers.items()},
            "paired": [vars(p) for p in self.paired],
        }
        return json.dumps(data, indent=1, ensure_ascii=False)


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare runs that count in the same unit (:func:`masa.report.runs.find`)."""
    at = {
        f"{column}_at": max(common)
        for column, key in (("training_loss", "loss"), ("held_out_loss", "validation_loss"))
        if (common := set.intersection(*(set(r.curve(key)) for r in runs)))
    }
    rows = [_numbers(r, at) for r in runs]
    order = ("steps", "trained_on", *_COUNTS, "training_loss_at", "held_out_loss_at", "training_loss", "held_out_loss")
    order += tuple(name for name in m.METRIC_NAMES if name not in (*_COUNTS, "tokens", "images"))
    order += ("per_second", "training_hours")
    numbers = {name: [row.get(name) for row in rows] for name in order if any(name in row for row in rows)}
    for column in ("training_loss", "held_out_loss"):  # said once where all have come equally far
        if numbers.get(f"{column}_at") == numbers.get(column):
            numbers.pop(f"{column}_at", None)
    return Comparison(tuple(runs), _differs(runs), at, numbers, tuple(_paired(runs, at, numbers)))


def _comparable(column: str, at: Mapping[str, int], numbers: Mapping[str, Any]) -> bool:
    """Losses of the last lines are so only if those are of one point, which ``*_at`` then need not repeat."""
    return f"{column}_at" not in HEADINGS or (f"{column}_at" in at and f"{column}_at" not in numbers)


def _same_data(one: Run, other: Run) -> bool | None:
    """Whether two runs were trained on the same data; None while one of them does not say."""
    inputs = [r.provenance.get("inputs") for r in (one, other)]
    return None if None in inputs else inputs[0] == inputs[1]


def write_csv(found: Comparison, path: Path) -> None:
    """Write :meth:`Comparison.frame`."""
    with whole_file(path) as file:
        found.frame().to_csv(file, index=False)


def _numbers(r: Run, at: Mapping[str, int]) -> dict[str, float]:
    """All that is known of one run; what is not finite counts as not known."""
    found: dict[str, Any] = {k: v for k, v in r.scores.items() if k in HEADINGS}
    if r.parameters:
        found |= m.flatten({"parameters": r.parameters})
    if r.unit != COMPRESSION:
        losses, held_out = r.curve("loss"), r.curve("validation_loss")
        last = r.log[-1] if r.log else {}
        seconds = r.training.get("training_seconds", last.get("training_seconds"))
        found |= {"steps": r.training.get("steps", last.get("step"))}
        found |= {"trained_on": r.training.get(r.unit, last.get(r.unit))}
        found |= {"training_loss_at": losses.get(at.get("training_loss_at", -1))}
        found |= {"held_out_loss_at": held_out.get(at.get("held_out_loss_at", -1))}
        found |= {"training_loss": next(reversed(losses.values()), None)}
        found |= {"held_out_loss": next(reversed(held_out.values()), None)}
        if seconds:
            found |= {"per_second": (found["trained_on"] or 0) / seconds, "training_hours": seconds / 3600}
    return {k: v for k, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}


def _differs(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Keys of specs that are not the same for all runs, then those of data, versions, machine and precision.

    A run that is still trained has no provenance yet, and does not count as different for that.
    """
    specs = [dict(_dotted(r.spec)) for r in runs]
    found = _not_the_same(specs, specs)
    made = [{k: v for k, v in _dotted(r.provenance, "provenance.") if k not in _SAID_BEFORE} for r in runs]
    return found | _not_the_same(made, [one for one in made if one])


def _not_the_same(all_of: Sequence[Mapping[str, Any]], counted: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for one in counted for key in one)
    return {
        key: [one.get(key) for one in all_of]
        for key in keys
        if any(one.get(key) != counted[0].get(key) for one in counted)
    }


def _dotted(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _paired(
    runs: Sequence[Run], at: Mapping[str, int], numbers: Mapping[str, Sequence[float | None]]
) -> Iterator[Paired]:
    """Differences of groups over their common seeds, if any group has more than one; none between other data."""
    groups: dict[str, dict[int, int]] = {}
    for index, r in enumerate(runs):
        if r.seed is not None:
            groups.setdefault(r.group, {})[r.seed] = index
    if len(groups) < 2 or all(len(seeds) < 2 for seeds in groups.values()):
        return
    (base, first), *others = groups.items()
    for group, seeds in others:
        common = [s for s, i in seeds.items() if s in first and _same_data(runs[i], runs[first[s]]) is not False]
        for column, values in numbers.items():
            if not _comparable(column, at, numbers):
                continue
            pairs = [(values[seeds[s]], values[first[s]]) for s in common]
            found = [a - b for a, b in pairs if a is not None and b is not None]
            if found and HEADINGS[column].better:
                std = statistics.stdev(found) if len(found) > 1 else None
                yield Paired(group, base, column, statistics.fmean(found), std, len(found))


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value
