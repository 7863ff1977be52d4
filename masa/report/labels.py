"""Words in figures: how wide they are, and where they stand without covering one another."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from scipy.optimize import isotonic_regression

from masa.report.style import SMALL, readable

PITCH = 1.3
"""Distance of lines of text, as a multiple of the font's size."""

LONGEST = 150.0
"""Points that a direct label may take; longer ones are cut."""


@functools.lru_cache(maxsize=4096)
def width_of(text: str, size: float, weight: str = "normal") -> float:
    """Width of one line of text in points."""
    return text_to_path.get_text_width_height_descent(text, FontProperties(size=size, weight=weight), ismath=False)[0]


def wrapped(text: str, size: float, width: float, weight: str = "normal") -> str:
    """Text in lines of at most ``width`` points; a word that is longer has a line of its own, cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if width_of(longer, size, weight) <= width:
            lines[-1] = longer
        else:
            lines.append(shortened(word, size, width, weight))
    return "\n".join(line for line in lines if line)


def shortened(text: str, size: float, width: float, weight: str = "normal") -> str:
    """Text of at most ``width`` points, its end cut and marked by an ellipsis where it is longer."""
    if width_of(text, size, weight) <= width:
        return text
    kept = bisect.bisect_right(range(len(text)), width, key=lambda n: width_of(f"{text[:n]}…", size, weight)) - 1
    return text[: max(kept, 0)].rstrip() + "…"


def spread(wanted: Sequence[float], pitch: float, low: float, high: float) -> list[float]:
    """Places at least ``pitch`` apart and between ``low`` and ``high``, as near as can be to the wanted ones.

    Least squares under these constraints. The order of the wanted places is kept. Where there is no room between
    ``low`` and ``high``, the places run on below ``low``.

    >>> spread([1.0, 1.0, 5.0], 1.0, 0.0, 10.0)
    [0.5, 1.5, 5.0]
    """
    order = np.argsort(np.asarray(wanted, dtype=float), kind="stable")
    steps = pitch * np.arange(len(order))
    free = isotonic_regression(np.asarray(wanted, dtype=float)[order] - steps).x
    last = high - pitch * (len(order) - 1)
    places = np.empty(len(order))
    places[order] = np.clip(free, min(low, last), last) + steps
    return places.tolist()


@dataclass(frozen=True)
class End:
    """What a line is called at its right end.

    Args:
        x, y: the end, in data; a ``y`` that is not in the panel has no leader drawn to it.
        text: the label.
        colour: of the line, as ``#RRGGBB``.
    """

    x: float
    y: float
    text: str
    colour: str


def add_ends(axis: Any, ends: Iterable[End]) -> list[Any]:
    """Texts right of a panel, for which a layout makes room; :func:`settle_ends` sets their heights."""
    place = {"transform": axis.transAxes, "va": "center", "fontsize": SMALL}
    return [
        axis.text(_TEXT_AT, 0.5, shortened(end.text, SMALL, LONGEST), color=readable(end.colour), **place)
        for end in ends
    ]


def settle_ends(axis: Any, ends: Sequence[End], texts: Sequence[Any]) -> None:
    """Set the texts of :func:`add_ends` near the ends of their lines, none over another, and draw leaders to them.

    Needs the final layout.
    """
    height = axis.get_window_extent().height
    pitch = PITCH * SMALL * axis.figure.dpi / 72 / height
    with np.errstate(invalid="ignore"):
        places = axis.transAxes.inverted().transform(axis.transData.transform([(end.x, end.y) for end in ends]))
    wanted = np.clip(np.nan_to_num(places[:, 1], nan=1, posinf=1, neginf=0), 0, 1)
    for end, text, (x, y), to in zip(ends, texts, places, spread(wanted, pitch, 0, 1), strict=True):
        text.set_y(to)
        if -0.01 <= y <= 1.01:
            leader = Line2D(
                [x + 0.01, 1, _TEXT_AT - 0.01], [y, y, to], color=end.colour, linewidth=0.5, clip_on=False,
                transform=axis.transAxes,
            )  # fmt: skip
            axis.add_artist(leader)


_TEXT_AT = 1.05


def settle_points(axis: Any, points: Sequence[End], obstacles: Sequence[tuple[float, float]] = ()) -> None:
    """Label points inside of a panel, each label beside its point where it covers the least. Needs the final layout.

    Args:
        obstacles: further places in data that labels keep away from, such as lines between points.
    """
    box, scale = axis.get_window_extent(), axis.figure.dpi / 72
    places = axis.transData.transform([(p.x, p.y) for p in points])
    busy = [np.concatenate([place - 3 * scale, place + 3 * scale]) for place in places]
    busy += [np.concatenate([place, place]) for place in axis.transData.transform(list(obstacles)).reshape(-1, 2)]
    for point, place in zip(points, places, strict=True):
        text = shortened(point.text, SMALL, LONGEST)
        size = np.array([width_of(text, SMALL), SMALL]) * scale
        options = [_beside(place, size, side, away * scale) for away in (5, 9, 14) for side in _SIDES]
        cost = [_covered(option, busy, box) + 1e-3 * n for n, option in enumerate(options)]
        best = options[int(np.argmin(cost))]
        busy.append(best)
        centre = axis.transAxes.inverted().transform((best[:2] + best[2:]) / 2)
        axis.text(
            *centre, text, ha="center", va="center", fontsize=SMALL, color=readable(point.colour),
            transform=axis.transAxes,
        )  # fmt: skip


_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1))


def _beside(place: np.ndarray, size: np.ndarray, side: tuple[int, int], away: float) -> np.ndarray:
    """The box (left, bottom, right, top) of a label on one side of a point."""
    centre = place + np.array(side) * (size / 2 + away * (0.7 if all(side) else 1))
    return np.concatenate([centre - size / 2, centre + size / 2])


def _covered(option: np.ndarray, busy: Sequence[np.ndarray], panel: Any) -> float:
    """How many things a box covers; outside of the panel is worst."""
    pad = 0.15 * (option[3] - option[1])
    hits = sum(
        bool(option[0] - pad < b[2] and b[0] < option[2] + pad and option[1] - pad < b[3] and b[1] < option[3] + pad)
        for b in busy
    )
    outside = option[0] < panel.x0 or option[2] > panel.x1 or option[1] < panel.y0 or option[3] > panel.y1
    return hits + 100.0 * outside
