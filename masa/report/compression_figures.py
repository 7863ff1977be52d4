"""Figures of training-free compression: the trade-off, where the ranks go, and how the outputs drift."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from masa.report import metrics as m
from masa.report.style import COLOURS, PROJECTION, look

NAMES = {"held_out": "Held-out text", "wikitext": "WikiText-2"}


def perplexity_reduction(spec: Mapping[str, Any], results: Path) -> Figure:
    """Perplexity over achieved reduction, one line a method, one panel a text; what is far off leaves the panel."""
    loaded = [(row, m.load(results, row["records"][0])) for row in spec["rows"]]
    model = loaded[0][0]["scale"]
    loaded = [(row, record) for row, record in loaded if row["scale"] == model]
    texts = list(loaded[0][1]["texts"])
    figure, axes = plt.subplots(1, len(texts), figsize=(1.6 + 3.2 * len(texts), 3.4), squeeze=False)
    lines: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    labels: dict[str, str] = {}
    dense = [row["experiment"] for row, record in loaded if record["compression"] is None]
    for row, record in loaded:
        achieved = record["compression"]["reduction_achieved"] if record["compression"] else 0.0
        lines.setdefault(row["experiment"], []).append((100 * achieved, record["texts"]))
        labels[row["experiment"]] = row["label"]
    for axis, text in zip(axes[0], texts, strict=True):
        lowest = min(t[text]["token_perplexity"] for points in lines.values() for _, t in points)
        for index, (name, points) in enumerate(lines.items()):
            x, y = zip(*sorted((p, t[text]["token_perplexity"]) for p, t in points), strict=True)
            if name in dense:
                axis.axhline(y[0], color="0.4", linewidth=1, label=labels[name], zorder=1)
            else:
                axis.plot(x, y, label=labels[name], markersize=3.5, **look(name, index))
        axis.set_yscale("log")
        axis.set_ylim(0.97 * lowest, 6 * lowest)
        ticks = [round(lowest * f) for f in (1, 1.25, 1.5, 2, 3, 4, 6)]
        axis.set_yticks(ticks, [str(t) for t in ticks])
        axis.yaxis.set_minor_locator(plt.NullLocator())
        axis.set_xlabel("Attention reduction (%)")
        axis.set_title(NAMES.get(text, text))
    axes[0][0].set_ylabel("Perplexity a token (log scale)")
    axes[0][-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.02))
    figure.suptitle(f"{spec['title']}\n({model}; lines that leave the panel are above)", fontsize=8)
    figure.tight_layout()
    return figure


def ranks(spec: Mapping[str, Any], results: Path) -> Figure:
    """Rank of every matrix as a fraction of its smaller side: layers across, projections down, one panel a method.

    Drawn for the largest reduction of the grid. White is rank 0 (atoms alone), orange is stored dense.
    """
    largest = max(row["reduction"] for row in spec["rows"])
    rows = [row for row in spec["rows"] if row["reduction"] == largest]
    figure, axes = plt.subplots(len(rows), 1, figsize=(6.6, 0.95 * len(rows) + 0.7), sharex=True, squeeze=False)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        report = m.load(results, row["records"][0])["compression"]
        grid, dense = rank_grid(report["learned"]["ranks"], report["shapes"])
        image = axis.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for y, x in np.argwhere(dense):
            axis.add_patch(
                plt.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=COLOURS[1], edgecolor="white", linewidth=0.3)
            )
        axis.set_yticks(range(len(grid)), [PROJECTION.get(p, p) for p in report["learned"]["ranks"]])
        axis.set_title(f"{row['label']}, {largest:g} % ({row['scale']})", loc="left")
        axis.grid(False)
    figure.subplots_adjust(hspace=0.6)
    layers = grid.shape[1]
    axes[-1][0].set_xticks(range(0, layers, 5), range(1, layers + 1, 5))
    axes[-1][0].set_xlabel("Layer (orange: stored dense)")
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="Rank / full rank", fraction=0.03, pad=0.02)
    figure.suptitle(spec["title"], fontsize=8, y=1.0)
    return figure


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
    """KL divergence between neighbouring blocks' outputs as bars; groups as alternating bands."""
    row = spec["rows"][0]
    record = m.load(results, row["records"][0])
    values, groups = record["drift"], record["compression"]["learned"]["groups"]
    figure, axis = plt.subplots(figsize=(6.0, 2.4))
    for index, group in enumerate(groups):
        axis.axvspan(group[0] + 0.5, group[-1] + 1.5, color=COLOURS[2], alpha=0.28 if index % 2 else 0.1, linewidth=0)
        axis.text(
            (group[0] + group[-1]) / 2 + 1,
            1.01,
            f"{group[0] + 1}–{group[-1] + 1}",
            ha="center",
            va="bottom",
            fontsize=6,
            transform=axis.get_xaxis_transform(),
        )
    axis.bar([i + 1.5 for i in range(len(values))], values, width=0.5, color=COLOURS[0])
    axis.set_xlim(0.5, len(values) + 1.5)
    axis.set_xlabel("Layer (bands: groups that share atoms; bars stand between two layers)")
    axis.set_ylabel("KL divergence (nats)")
    axis.set_title(f"{spec['title']} ({row['scale']})", pad=14, fontsize=7)
    return figure
