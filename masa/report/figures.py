"""Figures in one style: PDF for print, PNG for the screen, colour-blind safe. A new kind is one function in KINDS."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from masa import run
from masa.errors import unknown
from masa.report import compression_figures as compressed
from masa.report import metrics as m
from masa.report import vision_figures as vision
from masa.report.style import PROJECTION, STYLE, look
from masa.sources import whole_file


def write(spec: Mapping[str, Any], results: Path, folder: Path) -> None:
    """Draw one figure into ``NAME.pdf`` and ``NAME.png``.

    Raises:
        MasaError: a kind of figure that does not exist.
    """
    if spec["kind"] not in KINDS:
        raise unknown(f"figures.{spec['name']}: kind", spec["kind"], KINDS)
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure = KINDS[spec["kind"]](spec, results)
        for suffix in ("pdf", "png"):
            with whole_file(folder / f"{spec['name']}.{suffix}") as path:
                figure.savefig(path, metadata={"CreationDate": None} if suffix == "pdf" else {"Software": None})
        plt.close(figure)


def curves(spec: Mapping[str, Any], results: Path) -> Figure:
    """Held-out loss over training, and the paired difference to vanilla, which is where methods can be told apart.

    One line of panels a scale.
    """
    scales = list(dict.fromkeys(row["scale"] for row in spec["rows"]))
    unit = "images" if "family" in spec["rows"][0]["model"] else "tokens"
    figure, axes = plt.subplots(len(scales), 2, figsize=(6.8, 0.4 + 2.3 * len(scales)), squeeze=False)
    for (left, right), scale in zip(axes, scales, strict=True):
        rows = [row for row in spec["rows"] if row["scale"] == scale]
        base = {run_id: _curve(results, run_id, unit) for run_id in rows[0]["runs"]}
        for index, row in enumerate(rows):
            logs = {run_id: _curve(results, run_id, unit) for run_id in row["runs"]}
            seen = sorted(set.intersection(*(set(log) for log in logs.values())))
            style = look(row["experiment"], index)
            values = np.array([[log[t] for t in seen] for log in logs.values()])
            reference = np.array([[log[t] for t in seen] for log in base.values()])
            _band(left, seen, values, row["label"], style)
            _band(right, seen, values - reference, row["label"], style)
        for axis in (left, right):
            axis.set_xlabel(f"Training {unit}")
            axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        left.set_ylabel(f"Held-out loss (nats/{unit.removesuffix('s')})")
        right.set_ylabel(f"Difference to {rows[0]['label']}")
        if len(scales) > 1:
            left.set_title(scale, loc="left")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    band = "; band: ± 1 standard deviation" if len(spec["rows"][0]["runs"]) > 1 else ""
    figure.suptitle(f"{spec['title']} ({_seeds(spec)}{band})", fontsize=8)
    figure.tight_layout()
    return figure


def _seeds(spec: Mapping[str, Any]) -> str:
    count = len(spec["rows"][0]["runs"])
    return f"mean over {count} seeds" if count > 1 else "one seed"


def _curve(results: Path, run_id: str, unit: str) -> dict[int, float]:
    records = run.read_jsonl(m.below(results / "runs", run_id) / "metrics.jsonl")
    return {r[unit]: r["validation_loss"] for r in records if "validation_loss" in r}


def _band(axis: Any, x: list[int], values: np.ndarray, label: str, style: Mapping[str, Any]) -> None:
    mean = values.mean(0)
    axis.plot(x, mean, label=label, **style, markersize=3)
    if len(values) > 1:
        std = values.std(0, ddof=1)
        axis.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.12, linewidth=0)


def quality(spec: Mapping[str, Any], results: Path) -> Figure:
    """Held-out loss against stored attention parameters; the S sweeps of MASA-QKV and -QKVO are joined."""
    figure, axis = plt.subplots(figsize=(4.6, 3.0))
    groups: dict[str, list[tuple[float, float, str]]] = {}
    names: dict[str, str] = {}
    for row in spec["rows"]:
        flat = [m.flatten(m.load(results, record)) for record in row["records"]]
        x = flat[0]["attention_parameters"]
        y = statistics.fmean(f["validation_loss"] for f in flat)
        family = row["label"].partition(" S=")[0]
        groups.setdefault(family, []).append((x, y, f"S={row['sharing'].get('atoms')}"))
        if family == row["label"]:
            names[family] = row["experiment"]
    for index, (family, points) in enumerate(groups.items()):
        points.sort()
        x, y = zip(*((px, py) for px, py, _ in points), strict=True)
        axis.plot(x, y, label=family, **look(names.get(family, family), index), markersize=5)
        for px, py, note in points:
            if len(points) > 1:
                place = (4, 4) if index % 2 else (4, -9)  # neighbouring sweeps on different sides
                axis.annotate(note, (px, py), textcoords="offset points", xytext=place, fontsize=6)
    axis.margins(0.08)
    axis.set_xlabel("Stored attention parameters")
    axis.set_ylabel("Held-out loss (nats/token)")
    axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.set_title(f"{spec['title']} (lower left is better; {_seeds(spec)})", fontsize=8)
    return figure


def effective_rank(spec: Mapping[str, Any], results: Path) -> Figure:
    """Effective rank of every attention matrix over depth, one panel a projection."""
    figure, axes = plt.subplots(1, 4, figsize=(6.8, 2.1), sharey=True)
    for index, row in enumerate(spec["rows"]):
        ranks = run.read_json(m.below(results, row["records"][0]) / "weights.json", "masa evaluate")["effective_rank"]
        for axis, letter in zip(axes, PROJECTION, strict=True):
            axis.plot(
                range(1, len(ranks[letter]) + 1),
                ranks[letter],
                label=row["label"],
                **look(row["experiment"], index),
                markersize=3,
            )
    for axis, name in zip(axes, PROJECTION.values(), strict=True):
        axis.set_title(name)
        axis.set_xlabel("Layer")
    axes[0].set_ylabel("Effective rank")
    axes[0].set_ylim(bottom=0)
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def coefficients(spec: Mapping[str, Any], results: Path) -> Figure:
    """C of every projection as a heat map, layers down, atoms across."""
    row = spec["rows"][0]
    found = run.read_json(m.below(results, row["records"][0]) / "weights.json", "masa evaluate")["coefficients"]
    figure, axes = plt.subplots(1, len(found), figsize=(1.5 * len(found) + 0.8, 2.6), sharey=True, squeeze=False)
    limit = max(abs(v) for c in found.values() for line in c for v in line)
    for axis, (letter, values) in zip(axes[0], found.items(), strict=True):
        image = axis.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_title(PROJECTION.get(letter, letter))
        axis.set_xticks(range(len(values[0])), [str(i + 1) for i in range(len(values[0]))])
        axis.set_xlabel("Atom")
        axis.grid(False)
    layers = len(next(iter(found.values())))
    axes[0][0].set_yticks(range(0, layers, max(1, layers // 6)), range(1, layers + 1, max(1, layers // 6)))
    axes[0][0].set_ylabel("Layer")
    figure.colorbar(image, ax=axes[0].tolist(), label="Coefficient", fraction=0.05)
    figure.suptitle(f"{row['label']}, {row['scale']}", fontsize=8, y=1.02)
    return figure


KINDS: dict[str, Callable[[Mapping[str, Any], Path], Figure]] = {
    "curves": curves,
    "quality": quality,
    "effective_rank": effective_rank,
    "coefficients": coefficients,
    "accuracy_parameters": vision.accuracy_parameters,
    "confusion": vision.confusion,
    "per_class": vision.per_class,
    "predictions": vision.predictions,
    "detections": vision.detections,
    "perplexity_reduction": compressed.perplexity_reduction,
    "ranks": compressed.ranks,
    "drift": compressed.drift,
}
