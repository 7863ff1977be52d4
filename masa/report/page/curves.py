"""Loss over training of all runs, as data that the page's chart draws."""

from __future__ import annotations

from typing import Any

from masa.report.page.found import Found, Run, number
from masa.report.style import look

POINTS = 400
"""Points of one curve; longer ones are averaged over equal numbers of steps, and the page says so."""

DASHES = {"-": [], "--": [7, 4], "-.": [7, 3, 2, 3], ":": [2, 3]}
"""Matplotlib's line styles as a canvas knows them, in pixels; a tuple's own dashes are in line widths."""


def views(found: Found) -> list[dict[str, Any]]:
    """One entry a run that has a log: names, colour and dashes, and its ``train`` and ``held`` curves.

    A curve is ``{steps, amounts, seconds, losses}``, all of one length; ``amounts`` are tokens or images (``unit``).
    """
    return [_view(run) for run in found.runs if run.log]


def _view(run: Run) -> dict[str, Any]:
    unit = "images" if any("images" in record for record in run.log) else "tokens"
    train, steps_a_point = _thinned(_curve(run.log, "loss", unit))
    style = look(run.method)
    held, _ = _thinned(_curve(run.log, "validation_loss", unit))
    return {
        "id": run.id,
        "scale": run.scale,
        "method": run.label,
        "seed": run.seed,
        "unit": unit,
        "state": run.state,
        "own": run.own,
        "colour": style["color"],
        "dash": _dash(style["linestyle"]),
        "train": train,
        "held": held,
        "averaged": steps_a_point,
    }


def _dash(style: str | tuple[float, tuple[float, ...]]) -> list[float]:
    return DASHES[style] if isinstance(style, str) else [2.0 * part for part in style[1]]


def _curve(log: list[dict[str, Any]], key: str, unit: str) -> list[tuple[float, ...]]:
    """Points (step, amount, seconds, loss); a record without one of them, or with NaN, is no point."""
    rows = [[number(record.get(k)) for k in ("step", unit, "training_seconds", key)] for record in log]
    return [tuple(row) for row in rows if None not in row]  # type: ignore[misc]


def _thinned(points: list[tuple[float, ...]]) -> tuple[dict[str, list[float]], int]:
    """At most :data:`POINTS` points, each the mean of so many; and how many."""
    each = -(-len(points) // POINTS) or 1
    groups = [points[i : i + each] for i in range(0, len(points), each)]
    means = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]
    columns = list(zip(*means, strict=True)) or [()] * 4
    names = ("steps", "amounts", "seconds", "losses")
    return {name: [_short(v) for v in column] for name, column in zip(names, columns, strict=True)}, each


def _short(value: float) -> float | int:
    """Six significant digits: a page holds many numbers."""
    rounded = float(f"{value:.6g}")
    return int(value) if value == int(value) else rounded
