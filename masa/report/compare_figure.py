"""The curves of a comparison: held-out loss, and the difference to the first run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter, MaxNLocator

from masa.errors import MasaError
from masa.report.canvas import Canvas
from masa.report.compare import Comparison
from masa.report.labels import End
from masa.report.runs import COMPRESSION, Run
from masa.report.style import STYLE, TEXT, look
from masa.runs.files import whole_file

SUFFIXES = (".png", ".pdf", ".svg")
OTHERS = tuple(
    {"linestyle": line, "marker": marker} for line, marker in zip(("--", ":", "-.", "-"), "p<>h", strict=True)
)
"""Of the second run of an experiment, the third, …"""


def check(found: Comparison, path: Path) -> None:
    """See that there is something to draw, before anything is printed.

    Raises:
        MasaError: another kind of file, compressions, or a run without a held-out loss.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise MasaError(f"--out {path} must end in {', '.join(SUFFIXES)}.")
    if found.runs[0].unit == COMPRESSION:
        raise MasaError(f"--out {path}: compressed models have no curves of training; leave --out away.")
    for r in found.runs:
        if not r.curve("validation_loss"):
            raise MasaError(f"--out {path}: {r.name} has no held-out loss yet; wait for it, or leave it away.")


def draw(found: Comparison, path: Path) -> None:
    """Draw held-out losses over tokens or images, and beside them the differences to the first run.

    Raises:
        MasaError: see :func:`check`.
    """
    check(found, path)
    unit = found.runs[0].unit
    of_one = f"nats/{unit.removesuffix('s')}"
    looks = _looks(found.runs)
    with plt.rc_context(STYLE):
        canvas = Canvas(TEXT, 1.9, 1, 2)
        left, right = canvas.axes[0]
        first, ends = found.runs[0].curve("validation_loss"), []
        for r, style in zip(found.runs, looks, strict=True):
            curve = r.curve("validation_loss")
            left.plot(list(curve), list(curve.values()), **style)
            common = [x for x in curve if x in first]
            differences = [curve[x] - first[x] for x in common]
            right.plot(common, differences, **style)
            end = (common[-1], differences[-1]) if common else (max(first), float("nan"))
            ends.append(End(*end, _without_common(r.name, found.runs), style["color"]))
        canvas.label_ends(right, ends)
        for axis in (left, right):
            axis.set_xlabel(f"Training {unit}")
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.xaxis.set_major_locator(MaxNLocator(5))
        left.set_ylabel(f"Held-out loss ({of_one})")
        right.set_ylabel(f"Difference to {_without_common(found.runs[0].name, found.runs)}\n({of_one})")
        figure = canvas.finish("Held-out loss in training", _note(found))
        metadata = {".pdf": {"CreationDate": None}, ".png": {"Software": None}, ".svg": {"Date": None}}
        with whole_file(path) as file:
            figure.savefig(file, format=path.suffix[1:].lower(), metadata=metadata[path.suffix.lower()])
        plt.close(figure)


def _looks(runs: tuple[Run, ...]) -> list[dict[str, Any]]:
    """The look of each run's experiment; further runs of the same one keep its colour."""
    seen: Counter[str] = Counter()
    looks = []
    for r in runs:
        experiment = r.group.rpartition("/")[2]
        again = OTHERS[(seen[experiment] - 1) % len(OTHERS)] if seen[experiment] else {}
        looks.append(look(experiment) | again)
        seen[experiment] += 1
    return looks


def _without_common(name: str, runs: tuple[Run, ...]) -> str:
    """A run's id without the parts that all ids begin and end with."""
    ids = [r.name.split("/") for r in runs]
    parts, shortest = name.split("/"), min(map(len, ids))
    begin = next((i for i in range(shortest) if len({tuple(i_[: i + 1]) for i_ in ids}) > 1), 0)
    end = next((i for i in range(shortest - begin) if len({tuple(i_[len(i_) - i - 1 :]) for i_ in ids}) > 1), 0)
    return "/".join(parts[begin : len(parts) - end]) or name


def _note(found: Comparison) -> str:
    ids = [r.name.split("/") for r in found.runs]
    scales = {parts[0] for parts in ids}
    seeds = {r.seed for r in found.runs}
    said = f"Scale: {scales.pop()}. " if len(scales) == 1 and all(len(parts) == 3 for parts in ids) else ""
    return said + (f"Seed {seeds.pop()}; no error bars." if len(seeds) == 1 else "Single seeds; no error bars.")
