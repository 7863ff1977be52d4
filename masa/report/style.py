"""One look for all figures: colour-blind safe, the same for one experiment everywhere."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's palette, with line styles and markers so that colour is never the only sign
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#F0E442")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), "-", "--")
MARKERS = "osD^vPX*"
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.3,
    "figure.dpi": 200,
    "savefig.bbox": "tight",
    "pdf.fonttype": 42,
}
ORDER = ("vanilla", "gqa", "masa-qkv", "low-rank", "sequential", "repeat-all-over", "masa-qkvo")
PROJECTION = {"q": "Query", "k": "Key", "v": "Value", "o": "Output"}


def look(name: str, index: int) -> dict[str, Any]:
    """The same look for one experiment in every figure; what is not in ORDER takes the ``index``-th of 64."""
    index = ORDER.index(name) if name in ORDER else index
    again, index = divmod(index, len(COLOURS))
    other = (index + 3 * again) % len(COLOURS)
    return {"color": COLOURS[index], "linestyle": LINES[other], "marker": MARKERS[other]}
