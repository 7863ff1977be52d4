"""Figures in one style: PDF for print, PNG for the screen, colour-blind safe. A new kind is one function in KINDS."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from masa.errors import MasaError, unknown
from masa.evaluation import metrics as m
from masa.report import compression_figures as compressed
from masa.report import image_figures as images
from masa.report import vision_figures as vision
from masa.report.bytes_figure import perplexity_bytes
from masa.report.canvas import Canvas, of_seeds
from masa.report.curve import at, by_scale, curve
from masa.report.gap_figure import gap
from masa.report.labels import End
from masa.report.style import PROJECTION, STYLE, TEXT, look
from masa.runs import run
from masa.runs.files import whole_file


def write(spec: Mapping[str, Any], results: Path, folder: Path) -> None:
    """Draw one figure into ``NAME.pdf`` (fonts embedded) and ``NAME.png`` (300 dots an inch), both in print size.

    Raises:
        MasaError: a kind of figure that does not exist.
    """
    if spec["kind"] not in KINDS:
        raise unknown(f"figures.{spec['name']}: kind", spec["kind"], KINDS)
    figure = draw(spec, results)
    with plt.rc_context(STYLE):
        for suffix in ("pdf", "png"):
            with whole_file(folder / f"{spec['name']}.{suffix}") as path:
                figure.savefig(path, metadata={"CreationDate": None} if suffix == "pdf" else {"Software": None})
        plt.close(figure)


def draw(spec: Mapping[str, Any], results: Path) -> Figure:
    """One figure in the common style, for :func:`write` or a notebook.

    Args:
        spec: from :func:`masa.study.artefacts.artefact_spec`; its ``kind`` is a key of :data:`KINDS`.
        results: directory with ``evaluations/``, ``runs/`` and ``compression/``.
    """
    with plt.rc_context(STYLE):
        try:
            return KINDS[spec["kind"]](spec, results)
        except BaseException:
            plt.close()  # of the figure that could not be finished
            raise


def curves(spec: Mapping[str, Any], results: Path) -> Figure:
    """Held-out loss over training, and the paired difference to the first row, where methods can be told apart.

    One line of panels a scale.
    """
    scales = by_scale(spec["rows"])
    unit = "images" if "family" in spec["rows"][0]["model"] else "tokens"
    canvas = Canvas(TEXT, 1.9 * len(scales), len(scales), 2)
    for (left, right), (scale, rows) in zip(canvas.axes, scales.items(), strict=True):
        base = {run_id: curve(results, run_id, unit) for run_id in rows[0]["runs"]}
        ends = []
        for row in rows:
            logs = {run_id: curve(results, run_id, unit) for run_id in row["runs"]}
            seen = sorted(set.intersection(*map(set, [*logs.values(), *base.values()])))
            values = np.array([[log[t] for t in seen] for log in logs.values()])
            reference = np.array([[log[t] for t in seen] for log in base.values()])
            _band(left, seen, values, row)
            ends.append(_band(right, seen, values - reference, row))
        canvas.label_ends(right, ends)
        for axis in (left, right):
            axis.set_xlabel(f"Training {unit}")
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        of_one = f"nats/{unit.removesuffix('s')}"
        left.set_ylabel(f"Held-out loss ({of_one})")
        right.set_ylabel(f"Difference to {rows[0]['label']}\n({of_one})")
        if len(scales) > 1:
            left.set_title(scale)
    return canvas.finish(spec["title"], of_seeds(len(spec["rows"][0]["runs"])), at(scales))


def _band(axis: Any, x: list[int], values: np.ndarray, row: Mapping[str, Any]) -> End:
    """Draw means over seeds (runs, times) with their band."""
    mean, style = values.mean(0), look(row["experiment"])
    axis.plot(x, mean, label=row["label"], **style, markevery=max(1, len(x) // 10))
    if len(values) > 1:
        std = values.std(0, ddof=1)
        axis.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.1, linewidth=0)
    return End(x[-1], mean[-1], row["label"], style["color"])


def quality(spec: Mapping[str, Any], results: Path) -> Figure:
    """Held-out loss against stored attention parameters, one panel a scale; the sweeps over S are joined."""
    scales = by_scale(spec["rows"])
    canvas = Canvas(TEXT, 2.4 * len(scales), len(scales))
    for axis, (scale, rows) in zip(canvas.axes[:, 0], scales.items(), strict=True):
        families: dict[str, list[Mapping[str, Any]]] = {}
        for row in rows:
            families.setdefault(row["label"].partition(" S=")[0], []).append(row)
        drawn = [_sweep(axis, family, members, results) for family, members in families.items()]
        canvas.label_points(axis, *([x for found in part for x in found] for part in zip(*drawn, strict=True)))
        axis.margins(0.12)
        axis.set_xlabel("Stored attention parameters")
        axis.set_ylabel("Held-out loss (nats/token)")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        if len(scales) > 1:
            axis.set_title(scale)
    seeds = of_seeds(len(spec["rows"][0]["records"]), "bars")
    return canvas.finish(spec["title"], "Lower left is better.", seeds, at(scales))


def _sweep(
    axis: Any, family: str, rows: Sequence[Mapping[str, Any]], results: Path
) -> tuple[list[End], list[tuple[float, float]]]:
    """Draw one family; what its points are called, and places that its lines and error bars take."""
    points = []
    for row in rows:
        flat = [m.flatten(m.load(results, record)) for record in row["records"]]
        losses = np.array([f["validation_loss"] for f in flat])
        error = losses.std(ddof=1) if len(losses) > 1 else 0.0
        name = row["label"] if len(rows) == 1 else f"{family} S={row['sharing'].get('atoms')}"
        points.append((flat[0]["attention_parameters"], losses.mean(), error, name))
    points.sort()
    x, y, error, _ = zip(*points, strict=True)
    style = look(re.sub(r"-s\d+$", "", rows[0]["experiment"]))
    yerr = error if any(error) else None
    axis.errorbar(x, y, yerr=yerr, label=family, **style, markersize=4.5, capsize=2, elinewidth=0.8)
    steps = np.linspace(0, len(x) - 1, 12 * (len(x) - 1) + 1)
    taken = list(zip(np.interp(steps, range(len(x)), x), np.interp(steps, range(len(x)), y), strict=True))
    taken += [(a, b + s * e) for a, b, e, _ in points for s in (-1, -0.5, 0.5, 1)]
    return [End(a, b, name, style["color"]) for a, b, _, name in points], taken


def effective_rank(spec: Mapping[str, Any], results: Path) -> Figure:
    """Effective rank of every attention matrix over depth, one panel a projection, one line of panels a scale."""
    scales = by_scale(spec["rows"])
    canvas = Canvas(TEXT, 1.75 * len(scales), len(scales), 4, sharey="row", sharex="row")
    for line, (scale, rows) in zip(canvas.axes, scales.items(), strict=True):
        ends, highest = [], 0.0
        for row in rows:
            ranks = _weights(results, row)["effective_rank"]
            for axis, letter in zip(line, PROJECTION, strict=True):
                layers = range(1, len(ranks[letter]) + 1)
                highest = max(highest, *ranks[letter])
                axis.plot(layers, ranks[letter], label=row["label"], **look(row["experiment"]), markersize=2.5)
            ends.append(End(layers[-1], ranks[letter][-1], row["label"], look(row["experiment"])["color"]))
        canvas.label_ends(line[-1], ends)
        for axis, name in zip(line, PROJECTION.values(), strict=True):
            axis.set_title(name)
            axis.set_xlabel("Layer")
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        of_scale = f", {scale}" if len(scales) > 1 else ""
        line[0].set_ylabel(f"Effective rank\n(of {rows[0]['model']['hidden_size']}{of_scale})")
        line[0].set_ylim(0, 1.08 * highest)
    return canvas.finish(spec["title"], f"One seed ({_seed(spec)}); no error bars.", at(scales))


def _seed(spec: Mapping[str, Any]) -> str:
    return spec["rows"][0]["records"][0].rpartition("/")[2]


def _weights(results: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    return run.read_json(m.below(results, row["records"][0]) / "weights.json", "masa evaluate")


def coefficients(spec: Mapping[str, Any], results: Path) -> Figure:
    """C of every projection of the first row as a heat map, layers down, atoms across."""
    row = spec["rows"][0]
    found = _weights(results, row)["coefficients"]
    if not found:
        raise MasaError(f"figures.{spec['name']}: {row['experiment']} has no coefficients; name a run of MASA.")
    canvas = Canvas(TEXT, 2.2, 1, len(found), sharey=True)
    axes = canvas.axes[0]
    limit = max(abs(v) for c in found.values() for line in c for v in line)
    for axis, (letter, values) in zip(axes, found.items(), strict=True):
        layers, atoms = len(values), len(values[0])
        image = axis.imshow(
            values, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", extent=(0.5, atoms + 0.5, layers + 0.5, 0.5)
        )
        axis.set_title(PROJECTION.get(letter, letter))
        axis.xaxis.set_major_locator(MaxNLocator(min(atoms, 8), integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(min(layers, 12), integer=True))
        axis.set_xlabel("Atom")
        axis.grid(False)
    axes[0].set_ylabel("Layer")
    canvas.figure.colorbar(image, ax=list(axes), label="Coefficient", fraction=0.03, pad=0.02)
    return canvas.finish(spec["title"], f"{row['label']}, scale {row['scale']}, one seed ({_seed(spec)}).")


KINDS: dict[str, Callable[[Mapping[str, Any], Path], Figure]] = {
    "curves": curves,
    "gap": gap,
    "quality": quality,
    "effective_rank": effective_rank,
    "coefficients": coefficients,
    "accuracy_parameters": vision.accuracy_parameters,
    "confusion": vision.confusion,
    "per_class": vision.per_class,
    "predictions": images.predictions,
    "detections": images.detections,
    "perplexity_reduction": compressed.perplexity_reduction,
    "perplexity_bytes": perplexity_bytes,
    "ranks": compressed.ranks,
    "drift": compressed.drift,
}
