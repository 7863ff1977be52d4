"""The sheet that every figure is drawn on: print width, a title above, and below what error bars are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from masa.report.labels import PITCH, End, add_ends, settle_ends, settle_points, wrapped
from masa.report.style import SMALL

_PAD = 0.04  # inches


class Canvas:
    """Panels of a given print width.

    Args:
        width: of the figure in inches, :data:`.style.COLUMN` or :data:`.style.TEXT`; it is also what is saved.
        height: of the panels with their axes' labels; title, legend and notes come on top of it.
        rows, columns: panels.
        layout: "constrained", or "compressed" for pictures of a fixed shape.
        grid: further arguments of ``plt.subplots``.
    """

    def __init__(
        self, width: float, height: float, rows: int = 1, columns: int = 1, layout: str = "constrained", **grid: Any
    ) -> None:
        self.figure, self.axes = plt.subplots(
            rows, columns, figsize=(width, height), layout=layout, squeeze=False, **grid
        )
        self._settle: list[Callable[[], None]] = []

    def label_ends(self, axis: Any, ends: Sequence[End]) -> None:
        """Name lines at their right ends, outside of the panel."""
        ends = sorted(ends, key=lambda end: end.y)  # the order of those that are above the panel
        texts = add_ends(axis, ends)
        self._settle.append(lambda: settle_ends(axis, ends, texts))

    def label_points(self, axis: Any, points: Sequence[End], obstacles: Sequence[tuple[float, float]] = ()) -> None:
        """Name points beside them, inside of the panel."""
        self._settle.append(lambda: settle_points(axis, points, obstacles))

    def finish(self, title: str, *notes: str, handles: Sequence[Any] = ()) -> Figure:
        """Add title, notes and a legend below, give the figure its height, and let labels find their places.

        Args:
            notes: sentences below the panels; one says what error bars and bands are.
            handles: of a legend, for what cannot be labelled directly.
        """
        figure, dpi = self.figure, self.figure.dpi
        width, body = figure.get_size_inches()
        size, room = plt.rcParams["font.size"], 72 * (width - 2 * _PAD)
        title = wrapped(title, size, room, "bold")
        note = wrapped(" ".join(note for note in notes if note), SMALL, room)
        above = (title.count("\n") + 1) * PITCH * size / 72 + 2 * _PAD if title else _PAD
        below = (note.count("\n") + 1) * PITCH * SMALL / 72 + 2 * _PAD if note else _PAD
        legend = _legend(figure, handles, width - 2 * _PAD)
        height = body + above + below + (legend.get_window_extent().height / dpi if legend else 0)
        figure.set_size_inches(width, height)
        left = _PAD / width
        figure.text(left, 1 - _PAD / height, title, fontweight="bold", va="top")
        figure.text(left, _PAD / height, note, fontsize=SMALL, va="bottom", color="0.25")
        if legend:
            legend.set_bbox_to_anchor((left, below / height))
        bottom = 1 - (above + body) / height
        figure.get_layout_engine().set(rect=(0, bottom, 1, body / height), w_pad=_PAD, h_pad=_PAD)
        for axis in figure.axes:
            axis.tick_params(labelsize=SMALL)  # else the number of ticks would follow whatever style is set later
        for _ in range(2):  # ticks, and so the room that they take, change with the size of the panels
            figure.draw_without_rendering()
        figure.set_layout_engine("none")  # labels find their places in panels that stay
        for settle in self._settle:
            settle()
        return figure


def _legend(figure: Figure, handles: Sequence[Any], width: float) -> Any:
    """A legend with as many columns as fit into ``width`` inches; None without handles."""
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(handles=handles, loc="lower left", ncols=columns, borderaxespad=0, borderpad=0.2)
        if columns == 1 or legend.get_window_extent().width / figure.dpi <= width:
            return legend
        legend.remove()
    return None


def of_seeds(count: int, what: str = "band", alone: str = "") -> str:
    """The sentence that says what error bars or bands are.

    Args:
        count: seeds of every run.
        what: what is drawn: "band", "bars" or the like.
        alone: what they are for a single seed, where they are drawn then.
    """
    if count > 1:
        return f"Mean over {count} seeds, {what}: ± 1 standard deviation over them."
    return f"One seed, {what}: {alone}." if alone else "One seed; no error bars."
