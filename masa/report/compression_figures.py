"""Figures of training-free compression: the trade-off, where the ranks go, and how the outputs drift."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from masa.evaluation import metrics as m
from masa.report.canvas import Canvas
from masa.report.labels import End, width_of
from masa.report.style import BLACK, ORANGE, PROJECTION, SKY, SMALLEST, TEXT, look
from masa.sharing.spec import ATTENTION

NAMES = {"held_out": "Held-out text", "wikitext": "WikiText-2"}
HIGHEST = 6
"""Perplexities are drawn up to this multiple of the lowest."""
_ONE = "One calibration; no error bars."


def perplexity_reduction(spec: Mapping[str, Any], results: Path) -> Figure:
    """Perplexity over achieved reduction, one line a method, one panel a text; what is far off leaves the panel.

    Drawn for the first model of the grid.
    """
    model = spec["rows"][0]["scale"]
    rows = [row for row in spec["rows"] if row["scale"] == model]
    lines: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    dense, reduced = [], "Attention reduction (%)"
    for row in rows:
        record = m.load(results, row["records"][0])
        achieved = record["compression"]["reduction_achieved"] if record["compression"] else 0.0
        lines.setdefault(row["experiment"], []).append((100 * achieved, record["texts"]))
        if record["compression"] is None:
            dense.append(row["experiment"])
        elif set(record["compression"]["projections"]) > set(ATTENTION):
            reduced = "Reduction of all linear layers (%)"
    labels = {row["experiment"]: row["label"] for row in rows}
    texts = list(next(iter(lines.values()))[0][1])
    canvas = Canvas(TEXT, max(2.2, 0.3 + 0.19 * len(lines)), 1, len(texts))
    for axis, text in zip(canvas.axes[0], texts, strict=True):
        values = {n: sorted((p, t[text]["token_perplexity"]) for p, t in points) for n, points in lines.items()}
        lowest = min(y for points in values.values() for _, y in points)
        highest = HIGHEST * lowest
        ends = []
        for name, points in values.items():
            x, y = zip(*points, strict=True)
            style = look(name)
            if name in dense:
                right = max(p for points in values.values() for p, _ in points)
                axis.axhline(y[0], label=labels[name], zorder=1, **style)
                ends.append(End(right, y[0], labels[name], style["color"]))
                continue
            axis.plot(x, y, label=labels[name], **style)
            above = not y[-1] <= highest
            ends.append(End(x[-1], y[-1], labels[name] + (f" ↑ {_short(y[-1])}" if above else ""), style["color"]))
        axis.set_yscale("log")
        axis.set_ylim(0.97 * lowest, highest)
        at = ticks(0.97 * lowest, highest)
        axis.set_yticks(at, [f"{t:g}" for t in at])
        axis.yaxis.set_minor_locator(plt.NullLocator())
        axis.set_xlabel(reduced)
        axis.set_title(NAMES.get(text, text))
    canvas.label_ends(axis, ends)
    canvas.axes[0][0].set_ylabel("Perplexity per token (log scale)")
    far = (
        "↑: above the panel, with its perplexity at the largest reduction." if any("↑" in e.text for e in ends) else ""
    )
    return canvas.finish(spec["title"], f"{model}. {_ONE}", far)


def _short(value: float) -> str:
    """A large number in few characters."""
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.0f}" if value < 1e5 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones, about evenly on a logarithmic axis."""
    tens = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    return [t for ten in tens for t in (10.0**ten * f for f in (1, 1.5, 2, 3, 4, 5, 7)) if low <= t <= high]


def ranks(spec: Mapping[str, Any], results: Path) -> Figure:
    """Rank of every matrix as a fraction of its smaller side: layers across, projections down.

    One panel a method, one column of panels a model. Drawn for the largest reduction of the grid.
    """
    largest = max(row["reduction"] for row in spec["rows"])
    columns: dict[str, list[Mapping[str, Any]]] = {}
    for row in spec["rows"]:
        if row["reduction"] == largest:
            columns.setdefault(row["scale"], []).append(row)
    lines = max(map(len, columns.values()))
    canvas = Canvas(TEXT, 0.72 * lines + 0.3, lines, len(columns), sharex="col", sharey=True)
    for column, (model, rows) in enumerate(columns.items()):
        for axis, row in zip(canvas.axes[:, column], rows, strict=False):
            image = _draw_ranks(axis, m.load(results, row["records"][0])["compression"])
            heading = f"{model}\n" if row is rows[0] and len(columns) > 1 else ""
            axis.set_title(heading + row["label"])
        canvas.axes[-1][column].set_xlabel("Layer")
    canvas.figure.colorbar(image, ax=list(canvas.axes.flat), label="Rank / full rank", fraction=0.03, pad=0.01)
    note = f"{', '.join(columns)}. Attention reduced by {largest:g} %. White: rank 0. {_ONE}"
    return canvas.finish(spec["title"], note, handles=[Patch(color=ORANGE, label="stored dense")])


def _draw_ranks(axis: Any, report: Mapping[str, Any]) -> Any:
    grid, dense = rank_grid(report["learned"]["ranks"], report["shapes"])
    extent = (0.5, grid.shape[1] + 0.5, len(grid) - 0.5, -0.5)
    image = axis.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto", extent=extent)
    for y, x in np.argwhere(dense):
        axis.add_patch(plt.Rectangle((x + 0.5, y - 0.5), 1, 1, fc=ORANGE, ec="white", linewidth=0.3))
    axis.set_yticks(range(len(grid)), [PROJECTION.get(p, p) for p in report["learned"]["ranks"]])
    axis.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axis.grid(False)
    return image


def rank_grid(found: Mapping[str, Any], shapes: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Relative ranks (projections, L), and which matrices are dense.

    Args:
        found: projection -> [[layers, rank or "dense"], ...], as reports have it.
        shapes: projection -> [out, in].
    """
    layers = 1 + max(layer for groups in found.values() for group, _ in groups for layer in group)
    grid, dense = np.zeros((len(found), layers)), np.zeros((len(found), layers), bool)
    for y, (letter, groups) in enumerate(found.items()):
        for group, rank in groups:
            for layer in group:
                dense[y, layer] = rank == "dense"
                grid[y, layer] = 1.0 if rank == "dense" else rank / min(shapes[letter])
    return grid, dense


def drift(spec: Mapping[str, Any], results: Path) -> Figure:
    """KL divergence between neighbouring blocks' outputs as bars; the groups of the first row as alternating bands."""
    row = spec["rows"][0]
    record = m.load(results, row["records"][0])
    values, groups = record["drift"], record["compression"]["learned"]["groups"]
    if isinstance(groups, dict):  # by projection, where not all blocks have all of them
        groups = next(iter(groups.values()))
    layers = len(values) + 1
    canvas = Canvas(TEXT, 1.9)
    axis = canvas.axes[0][0]
    for index, group in enumerate(groups):
        axis.axvspan(group[0] + 0.5, group[-1] + 1.5, color=SKY, alpha=0.28 if index % 2 else 0.1, linewidth=0)
        name = f"{group[0] + 1}–{group[-1] + 1}" if len(group) > 1 else f"{group[0] + 1}"
        if width_of(name + " ", SMALLEST) < 72 * 0.88 * TEXT * len(group) / layers:  # where its band is wide enough
            axis.text(
                (group[0] + group[-1]) / 2 + 1, 1.01, name, ha="center", va="bottom", fontsize=SMALLEST,
                transform=axis.get_xaxis_transform(),
            )  # fmt: skip
    axis.bar([i + 1.5 for i in range(len(values))], values, width=0.5, color=BLACK)
    axis.set_xlim(0.5, layers + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axis.grid(False, axis="x")
    axis.set_xlabel("Layer")
    axis.set_ylabel("KL divergence (nats)")
    return canvas.finish(
        spec["title"],
        f"{row['scale']}. Bars stand between two layers. Bands: groups of layers, {row['label']} at "
        f"{row['reduction']:g} %. {_ONE}",
    )
