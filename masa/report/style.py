"""One look for all figures: print sizes, fonts, and the same colour, line and marker for a method everywhere."""

from __future__ import annotations

import zlib
from typing import Any

COLUMN, TEXT = 3.25, 6.75
"""Widths in inches that figures are drawn at: one column, and the whole width, of a two-column page (ICML's; a figure
over the whole width shrinks to 81 % on NeurIPS's single column of 5.5 inches)."""

LABEL, SMALL, SMALLEST = 7.0, 6.5, 6.0
"""Points: of axis labels; of ticks, direct labels and notes; and of the smallest text that any figure has."""

# Okabe and Ito's palette, with grey for its yellow, which white paper swallows
COLOURS = BLACK, ORANGE, SKY, GREEN, VERMILLION, PINK, BLUE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#7F7F7F",
)  # fmt: skip
_LINES = _SOLID, _DASHED, _DASHDOT, _DOTTED, _LONG, _SHORT = "-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1))
_OTHERS = "<>phd8"
"""Markers that no method below has."""

STYLE = {
    "font.size": 8,
    "axes.titlesize": LABEL,
    "axes.titlelocation": "left",
    "axes.labelsize": LABEL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 3,
    "figure.dpi": 300,
    "savefig.dpi": 300,
    "savefig.bbox": None,  # "tight" would change the width
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a label with a $ is a label
}

PROJECTION = {"q": "Query", "k": "Key", "v": "Value", "o": "Output"}

_LOOKS = {
    "vanilla": (BLACK, _SOLID, "o"),
    "gqa": (ORANGE, _DASHED, "s"),
    "masa-qkv": (SKY, _DASHDOT, "D"),
    "low-rank": (GREEN, _DOTTED, "^"),
    "sequential": (VERMILLION, _LONG, "v"),
    "repeat-all-over": (PINK, _SHORT, "P"),
    "masa-qkvo": (BLUE, _SOLID, "X"),
    "masa-qkvo-s4": (BLUE, _DOTTED, "*"),
    # further trainings: their family's colour while it has lines, and no two alike without markers, as in the page
    "low-rank-text": (GREEN, _DASHED, "^"),
    "masa-qkv-s2": (SKY, _DOTTED, "v"),
    "masa-qkv-s6": (SKY, _DASHED, "s"),
    "masa-qkv-s8": (SKY, _LONG, "P"),
    "masa-qkv-common-qv": (SKY, _SOLID, "v"),
    "masa-qkv-common-qk": (SKY, _SHORT, "^"),
    "masa-qkv-common-qkv": (GREY, _DASHDOT, "D"),
    "masa-qkv-common-qv-budget": (GREY, _DOTTED, "s"),
    "masa-qkvo-s2": (BLUE, _DASHED, "v"),
    "masa-qkvo-s6": (BLUE, _DASHDOT, "s"),
    "masa-qkvo-s8": (BLUE, _LONG, "P"),
    "masa-qkvo-mlp": (BLUE, _SHORT, "^"),
    "masa-qkvo-fixed-norm": (GREY, _SOLID, "X"),
    "masa-per-head": (GREY, _LONG, "^"),
    "masa-legendre": (GREY, _SHORT, "v"),
    "relaxed": (PINK, _DASHED, "s"),
    # compressions: a colour a family
    "original": (GREY, _DASHED, ""),
    "svd": (BLACK, _DASHED, "s"),
    "svd-llm": (SKY, _SOLID, "D"),
    "svd-llm-update": (SKY, _DOTTED, "^"),
    "svd-llm-global": (BLUE, _DASHED, "P"),
    "svd-global": (BLUE, _SOLID, "s"),
    "basis-sharing": (PINK, _LONG, "v"),
    "direct-share": (ORANGE, _SOLID, "P"),
    "post-share": (ORANGE, _DASHED, "X"),
    "matrix-pca-role": (GREEN, _DOTTED, "v"),
    "matrix-pca": (GREEN, _SOLID, "^"),
    "matrix-pca-data": (GREEN, _DASHED, "o"),
    "matrix-pca-fisher": (VERMILLION, _DASHED, "^"),
    "svd-fisher": (VERMILLION, _SOLID, "o"),
    # of all linear layers: published ones dashed, ours beside them solid
    "whole-svd-llm": (SKY, _DASHED, "D"),
    "whole-svd-fisher": (VERMILLION, _SOLID, "D"),
    "whole-rocket": (GREEN, _DASHED, "D"),
    "whole-dictionaries": (GREEN, _SOLID, "D"),
    "whole-geopair": (PINK, _DASHED, "v"),
    "whole-pairs": (PINK, _SOLID, "v"),
    "whole-wanda": (ORANGE, _DASHED, "P"),
    "whole-sparse": (ORANGE, _SOLID, "D"),
    "whole-mixed": (BLUE, _SOLID, "D"),
    "whole-replace-me": (BLACK, _DASHED, "D"),
    # of whole files: 16 bits dashed, fewer solid, healed dotted
    "bytes-sparse-16": (ORANGE, _DASHED, "o"),
    "bytes-drop-blocks": (BLACK, _DASHED, "P"),
    "bytes-int8": (ORANGE, _LONG, "s"),
    "bytes-sparse": (ORANGE, _SOLID, "o"),
    "bytes-healed": (ORANGE, _DOTTED, "o"),
    "bytes-dictionaries": (GREEN, _SOLID, "v"),
    "bytes-dictionaries-16": (GREEN, _DASHED, "v"),
    "bytes-dictionaries-16-healed": (GREEN, _DOTTED, "P"),
    "bytes-low-rank": (BLUE, _SOLID, "o"),
    # one size each: markers alone
    "bytes-f16": (BLACK, _LONG, "o"),
    "bytes-q8_0": (BLACK, _LONG, "s"),
    "bytes-q6_k": (BLACK, _LONG, "^"),
    "bytes-q5_k_m": (BLACK, _LONG, "v"),
    "bytes-q4_k_m": (BLACK, _LONG, "D"),
    "bytes-q4_0": (BLACK, _LONG, "P"),
    "bytes-iq4_xs": (BLACK, _LONG, "X"),
}


def look(name: str) -> dict[str, Any]:
    """The look of one experiment, the same in every figure; a name that is not known here gets one by its hash.

    Returns:
        ``color``, ``linestyle`` and ``marker``, as matplotlib's ``plot`` takes them.
    """
    if name in _LOOKS:
        return dict(zip(("color", "linestyle", "marker"), _LOOKS[name], strict=True))
    line, colour = divmod(zlib.crc32(name.encode()) % 48, 8)
    return {"color": COLOURS[colour], "linestyle": _LINES[line], "marker": _OTHERS[(line + colour) % 6]}


def readable(colour: str) -> tuple[float, float, float]:
    """A colour for text: darkened until it stands out from white paper 4.5 to 1 (WCAG's contrast)."""
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    while contrast(rgb) < 4.5:
        rgb = [0.95 * part for part in rgb]
    return (rgb[0], rgb[1], rgb[2])


def contrast(rgb: Any) -> float:
    """Contrast of a colour (red, green, blue in 0 to 1) with white: 1 to 21."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
