"""Time and memory of calibration and of the closed-form methods over layers L and width d, and of whole Llamas.

    python benchmarks/compression_growth.py
    python benchmarks/compression_growth.py --shape 4096 14336 32 8 --layers 2 4 --methods svd-global    # Llama-3.1-8B

Blocks are Llama's (FFN 3.5 d wide, a quarter as many key and value heads as query heads), random, stored in bfloat16
and read memory-mapped. L is varied at one d and d at one L, each size in a process of its own, on one thread. Time is
processor seconds; memory is the peak of anonymous pages above that before (pages of the mapped file can be dropped at
any time and do not count). All of attention is compressed by 20 %, after 512 tokens of calibration.

Cost is a line in L, a + b L by least squares, and a power of d. Both are extrapolated from the widest blocks to
Llama-3.1-8B and 70B, and the arithmetic is printed. It is done twice: as fitted, where small matrices lower the power
of d, and by what the cost model says of d: FLOPs for time, d^2 for memory, which calibration needs for one block at a
time, whatever L. These are no measurements: with --shape and two counts of --layers, blocks of the real shape are
measured, and L alone is extrapolated. With --projections all every linear layer is compressed, as the methods whose
budget is in bytes are made for (saved under another name); where one of --methods needs gradients, calibration runs
all of its sequences backward, too.

L starts at 8, where Matrix PCA has several groups of layers, as in whole models. It runs without the option to leave
layers dense: a group whose layers all stay dense is factorised a second time, which can about double the time, and in
random models it is chance which groups these are.

Matrix PCA could be written with the covariance of vectorised matrices, (d h x d h) for matrices (d, h). A row says how
large the largest tensor was that any operator allocated: there is no such thing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Row, apart, parser, save, slope
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from masa.compression import calibrate, compress
from masa.compression.names import needs_gradients
from masa.models.pretrained import load_pretrained
from masa.study.cost import compression as cost
from masa.study.cost.sizes import Sizes, of_pretrained
from masa.study.cost.transformer import forward


@dataclass(frozen=True)
class Kind:
    """What is measured, its unit, and what its growth with d is expected from."""

    name: str
    unit: str
    power: str


KINDS = {"seconds": Kind("time", "s", "FLOPs"), "gib": Kind("memory", "GiB", "d^2")}
OPTIONS = {"matrix-pca": {"ranks": "global"}}
METHODS = ("svd-llm", "svd-global", "matrix-pca")
LETTERS = {"attention": "qkvo", "all": "qkvogud"}
SAMPLES, LENGTH, VOCABULARY, REDUCTION = 2, 256, 1024, 0.2
GIB = 2**30
TIMES, ENOUGH_SECONDS = (2, 4), 1.0
M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclass(frozen=True)
class Shape:
    """A Llama."""

    width: int
    ffn: int
    heads: int
    kv_heads: int
    layers: int

    @property
    def sizes(self) -> Sizes:
        """What the cost model reads."""
        known = {"hidden_size": self.width, "intermediate_size": self.ffn, "num_layers": self.layers}
        known |= {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": VOCABULARY}
        found = of_pretrained({"sizes": known}, LENGTH)
        assert found is not None
        return found

    def work(self, stage: str, letters: str) -> float:
        """FLOPs by the cost model; only ratios of them are used."""
        if stage == "calibration":
            tokens = SAMPLES * LENGTH
            return (
                forward(self.sizes, SAMPLES, LENGTH, logits=False).flops + cost.grams(self.sizes, letters, tokens).flops
            )
        return cost.decompositions(self.sizes, letters)


WHOLE = {
    "Llama-3.1-8B": Shape(4096, 14336, 32, 8, 32),
    "Llama-3.1-70B": Shape(8192, 28672, 64, 8, 80),
}


def small(width: int, layers: int) -> Shape:
    """The 8B model's proportions in small; heads are narrower, not fewer."""
    return Shape(width, 7 * width // 2, 8, 2, layers)


@dataclass(frozen=True)
class Found:
    """What one stage took.

    Attributes:
        seconds: of the processor.
        gib: peak of anonymous memory.
        largest: numbers of the largest tensor that an operator allocated.
        group: layers of the largest group that have atoms in common; 1 without atoms.
    """

    seconds: float
    gib: float
    largest: int
    group: int = 1


def main() -> int:
    made = parser(__doc__)
    made.add_argument(
        "--shape", type=int, nargs=4, metavar=("D", "FFN", "HEADS", "KV"), help="measure this one instead"
    )
    made.add_argument("--layers", type=int, nargs=2, default=[2, 4], help="counts that --shape is measured at")
    made.add_argument("--of", type=int, default=32, help="layers of the whole model of --shape")
    made.add_argument("--methods", nargs="+", default=list(METHODS), help="of masa compress")
    made.add_argument("--projections", choices=LETTERS, default="attention", help="what is compressed")
    made.add_argument("--threads", type=int, default=1)
    given = made.parse_args()
    return one_shape(given) if given.shape else growth(given)


def growth(given: argparse.Namespace) -> int:
    """L at one d, d at one L; slopes, fits, extrapolations and the figure."""
    layers, widths = ((4, 6), (128, 256)) if given.quick else ((8, 12, 16, 24), (384, 512, 640, 896))
    over = {"L": [small(widths[0], L) for L in layers], "d": [small(d, layers[0]) for d in widths]}
    measured = {}
    for shape in dict.fromkeys([*over["L"], *over["d"]]):
        measured[shape] = apart(lambda shape=shape: measure(shape, given))
        told = ", ".join(f"{stage} {f.seconds:.3g} s {f.gib:.3g} GiB" for stage, f in measured[shape].items())
        print(f"L = {shape.layers}, d = {shape.width}: {told}", flush=True)
    rows, fits, names = [], {}, ["calibration", *given.methods]
    for stage, kind in itertools.product(names, KINDS):
        fit = fits[stage, kind] = Fit.of(over, measured, stage, kind, LETTERS[given.projections])
        rows += [replace(row, target="") for row in fit.rows()] if given.quick else fit.rows()
        for model, shape in WHOLE.items():
            print(fit.arithmetic(model, shape))
            fitted, expected = fit.at(shape)
            name = f"{stage}, {KINDS[kind].name} of {model}, extrapolated"
            rows.append(Row(f"{name} by {KINDS[kind].power}", expected, KINDS[kind].unit))
            rows.append(Row(f"{name} as fitted", fitted, KINDS[kind].unit))
    rows += largest(measured, names, given.projections)
    name = "compression_growth" if given.projections == "attention" else "compression_growth_all"
    given.out.mkdir(parents=True, exist_ok=True)
    draw(over, measured, fits, given.out / f"{name}.png")
    return save(name, rows, about(given, measured), given.out)


def one_shape(given: argparse.Namespace) -> int:
    """Blocks of a given shape, at two counts, and the line through both."""
    shapes = [Shape(*given.shape, count) for count in given.layers]
    measured = {}
    for shape in shapes:
        measured[shape] = apart(lambda shape=shape: measure(shape, given))
        print(f"{shape.layers} layers: {measured[shape]}", flush=True)
    (a, b), rows = given.layers, []
    for stage in measured[shapes[0]]:
        for kind in KINDS:
            unit = KINDS[kind].unit
            first, second = (getattr(measured[shape][stage], kind) for shape in shapes)
            each = (second - first) / (b - a)
            whole = first + each * (given.of - a)
            print(f"{stage}: {first:.3g} + {each:.3g} x ({given.of} - {a}) = {whole:.3g} {unit}")
            name = f"{stage}, {KINDS[kind].name}"
            rows.append(Row(f"{name} a layer", each, unit))
            rows.append(Row(f"{name}, extrapolated to {given.of} layers", whole, unit))
    rows += largest(measured, list(measured[shapes[0]]), given.projections)
    return save("compression_shape", rows, about(given, measured), given.out)


def largest(measured: Mapping[Shape, Mapping[str, Found]], stages: Sequence[str], projections: str) -> list[Row]:
    """The largest tensors beside what must be held at once, and beside what must not be."""
    rows = []
    for stage in stages:
        if stage == "calibration":
            what, needs = "a block's FFN matrix or activations", {s: s.ffn * max(s.width, LENGTH) for s in measured}
            if projections == "all":
                what, needs = "one input's moments, f x f", {s: s.ffn * max(s.ffn, LENGTH) for s in measured}
        elif projections == "all":
            what, needs = "one input's moments, f x f", {s: s.ffn**2 for s in measured}
        else:
            needs = {s: found[stage].group * s.width**2 for s, found in measured.items()}
            what = "one group's weights, n x d x d" if "pca" in stage else "one weight, d x d"
        share = max(found[stage].largest / needs[s] for s, found in measured.items())
        rows.append(Row(f"{stage}: largest tensor beside {what}", share, target="<= 1"))
        if "pca" in stage:
            share = max(found[stage].largest / s.width**4 for s, found in measured.items())
            rows.append(Row(f"{stage}: largest tensor beside a covariance, d h x d h", share, target="<= 0.01"))
    return rows


def about(given: argparse.Namespace, measured: Mapping[Shape, Mapping[str, Found]]) -> dict[str, Any]:
    """What the numbers were made with, and all of them."""
    settings = {
        "threads": given.threads,
        "projections": given.projections,
        "samples": SAMPLES,
        "length": LENGTH,
        "reduction": REDUCTION,
        "options": OPTIONS,
    }
    points = [asdict(shape) | {stage: asdict(f) for stage, f in found.items()} for shape, found in measured.items()]
    return settings | {"points": points}


# ------------------------------------------------------------------------------------------------------------- fits


@dataclass(frozen=True)
class Fit:
    """One stage's time or memory: a line in L at one width, a power of d at one L.

    Attributes:
        line: (a, b) of a + b L.
        r2: of the line.
        of_layers, of_width: slopes on log-log axes.
        expected: slope against d by arithmetic, over the same widths.
        letters: projections that are compressed.
        widest: the widest shape that was measured, and its cost.
    """

    stage: str
    kind: str
    line: tuple[float, float]
    r2: float
    of_layers: float
    of_width: float
    expected: float
    letters: str
    widest: tuple[Shape, float]

    @classmethod
    def of(
        cls,
        over: Mapping[str, list[Shape]],
        measured: Mapping[Shape, Mapping[str, Found]],
        stage: str,
        kind: str,
        letters: str,
    ) -> Fit:
        """Fit the measured points."""
        layers, widths = [s.layers for s in over["L"]], [s.width for s in over["d"]]
        ys = {key: np.array([getattr(measured[s][stage], kind) for s in shapes]) for key, shapes in over.items()}
        b, a = np.polyfit(layers, ys["L"], 1)
        left_over = ((ys["L"] - (a + b * np.array(layers))) ** 2).sum()
        return cls(
            stage=stage,
            kind=kind,
            line=(float(a), float(b)),
            r2=float(1 - left_over / max(((ys["L"] - ys["L"].mean()) ** 2).sum(), 1e-300)),
            of_layers=slope(layers, ys["L"]),
            of_width=slope(widths, ys["d"]),
            expected=slope(widths, [s.work(stage, letters) for s in over["d"]]) if kind == "seconds" else 2.0,
            letters=letters,
            widest=(over["d"][-1], float(ys["d"][-1])),
        )

    def rows(self) -> list[Row]:
        """Slopes, and how straight the line is."""
        name, seconds = f"{self.stage}, {KINDS[self.kind].name}", self.kind == "seconds"
        expected = "1" if seconds else "0" if self.flat else "at most 1"
        target = "0.8 to 1.2" if seconds else "<= 0.2" if self.flat else "<= 1.1"
        rows = [Row(f"{name} against L: slope (expected {expected})", self.of_layers, "slope", target=target)]
        if seconds:
            rows.append(Row(f"{name} against L: R^2 of a line", self.r2, "R^2", target=">= 0.98"))
        target = f"<= {self.expected + 0.2:.2f}" if seconds else "1.7 to 2.3"
        of_width = f"{name} against d: slope (expected {self.expected:.2f})"
        return [*rows, Row(of_width, self.of_width, "slope", target=target)]

    @property
    def flat(self) -> bool:
        """Whether it should not grow with L: calibration holds one block after the other."""
        return self.stage == "calibration" and self.kind == "gib"

    def factors(self, shape: Shape) -> tuple[float, float, float, float]:
        """What a model costs more than the widest measured: by L and by d as fitted; by L and by d by arithmetic."""
        (a, b), here = self.line, self.widest[0]
        ratio = shape.width / here.width
        work = replace(shape, layers=1).work(self.stage, self.letters)
        work /= replace(here, layers=1).work(self.stage, self.letters)
        by_line = max(1.0, (a + b * shape.layers) / (a + b * here.layers))
        by_work = work if self.kind == "seconds" else ratio**2
        return by_line, ratio**self.of_width, 1.0 if self.flat else by_line, by_work

    def at(self, shape: Shape) -> tuple[float, float]:
        """Of a whole model, extrapolated in both ways: as fitted, and by arithmetic."""
        of_line, of_fit, of_layers, of_work = self.factors(shape)
        return self.widest[1] * of_line * of_fit, self.widest[1] * of_layers * of_work

    def arithmetic(self, model: str, shape: Shape) -> str:
        """The extrapolation, written out."""
        (a, b), (here, cost_here), kind = self.line, self.widest, KINDS[self.kind]
        (of_line, of_fit, of_layers, of_work), (fitted, expected) = self.factors(shape), self.at(shape)
        line = f"({a:.3g} + {b:.3g} x {shape.layers}) / ({a:.3g} + {b:.3g} x {here.layers}) = {of_line:.3g}"
        return (
            f"{model}, {self.stage}, {kind.name} (extrapolated): "
            f"{cost_here:.3g} {kind.unit} at L = {here.layers}, d = {here.width}; for L x {line}; "
            f"for d x ({shape.width} / {here.width})^{self.of_width:.2f} = {of_fit:.4g}: {said(fitted, self.kind)} as "
            f"fitted; x {of_layers:.3g} x {of_work:.4g} by {kind.power}: {said(expected, self.kind)}"
        )


def said(number: float, kind: str) -> str:
    """In the unit that it is easiest read in."""
    if kind == "gib":
        return f"{number:.3g} GiB"
    return (
        f"{number:.0f} s" if number < 600 else f"{number / 60:.0f} min" if number < 7200 else f"{number / 3600:,.1f} h"
    )


# -------------------------------------------------------------------------------------------------------- measuring


def measure(shape: Shape, given: argparse.Namespace) -> dict[str, Found]:
    """Calibrate and compress a model of this shape, after a tiny one that loads what is loaded late."""
    torch.set_num_threads(given.threads)
    # small matrices are mapped and given back like large ones, so that memory is that of what is alive (glibc)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    letters = LETTERS[given.projections]
    stages(small(64, 2), given.methods, letters, (1, 1))
    return stages(shape, given.methods, letters, (1, 1) if given.quick or given.shape else TIMES)


def stages(shape: Shape, methods: Sequence[str], letters: str, times: tuple[int, int]) -> dict[str, Found]:
    """Every stage, for the least time and the median memory of ``times``: at least, and at most where it is short."""
    with tempfile.TemporaryDirectory() as folder:
        write(shape, folder)
        tokens = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
        calibration, result = None, {}
        backward = SAMPLES if any(map(needs_gradients, methods)) else 0
        for stage in ("calibration", *methods):
            found, spent, largest = [], 0.0, None
            while len(found) < times[0] or (len(found) < times[1] and spent < ENOUGH_SECONDS):
                model, _ = load_pretrained(folder)
                group = 1
                with Largest() if not found else contextlib.nullcontext(largest) as largest, Peak() as peak:
                    if stage == "calibration":
                        known = {"projections": letters, "dtype": torch.float32, "gradient_samples": backward}
                        calibration = calibrate(model, tokens, directory=Path(folder) / "c", batch_size=1, **known)
                    else:
                        options = OPTIONS.get(stage, {})
                        _, report = compress(model, stage, calibration, REDUCTION, projections=letters, **options)
                        group = max(map(len, report.learned.get("groups", [[0]])))
                found.append(Found(peak.seconds, peak.gib, largest.numbers, group))
                spent += peak.seconds
                del model
            seconds, gib = min(f.seconds for f in found), statistics.median(f.gib for f in found)
            result[stage] = replace(found[0], seconds=seconds, gib=gib)
    return result


def write(shape: Shape, folder: str) -> None:
    """A random model in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.layers,
        vocab_size=VOCABULARY,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that an operator allocates; views and results in place are none."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _storage(tensor) not in given:
                self.numbers = max(self.numbers, tensor.numel())
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Peak:
    """Peak of anonymous memory above that at the start, and processor time, of a block of code; it watches itself."""

    def __enter__(self) -> Peak:
        self.start, self.most, self.running, self.watching = anonymous(), 0, True, 0.0
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.began = time.process_time()
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, anonymous())
            time.sleep(0.0005)
        self.watching = time.thread_time()

    def __exit__(self, *error: object) -> None:
        self.running = False
        self.thread.join()
        self.seconds = time.process_time() - self.began - self.watching
        self.gib = (self.most - self.start) / GIB


def anonymous() -> int:
    """Bytes of this process that no file backs (Linux)."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


# ----------------------------------------------------------------------------------------------------------- figure


def draw(
    over: Mapping[str, list[Shape]],
    measured: Mapping[Shape, Mapping[str, Found]],
    fits: Mapping[tuple[str, str], Fit],
    path: Path,
) -> None:
    """Time and memory over L, over d, and what whole models would take."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from masa.report.canvas import Canvas
    from masa.report.style import SMALL, STYLE, TEXT, VERMILLION, look, readable

    names = list(dict.fromkeys(stage for stage, _ in fits))
    looks = {stage: look(stage) | {"linestyle": ""} for stage in names} | {
        "calibration": {"color": VERMILLION, "linestyle": "", "marker": "o"}
    }
    with plt.rc_context(STYLE):
        canvas = Canvas(TEXT, 4.3, 2, 3, gridspec_kw={"width_ratios": [1, 1, 1.15]})
        for (of_layers, of_width, whole), kind in zip(canvas.axes, KINDS, strict=True):
            for axis in (of_layers, of_width, whole):
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.9g}"))
                axis.yaxis.set_minor_locator(NullLocator())
                if axis is not whole:
                    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for axis, size, field in ((of_layers, "L", "layers"), (of_width, "d", "width")):
                axis.set_xscale("log")
                xs = [getattr(shape, field) for shape in over[size]]
                for number, stage in enumerate(names):
                    fit, ys = fits[stage, kind], [getattr(measured[shape][stage], kind) for shape in over[size]]
                    axis.plot(xs, ys, **looks[stage], zorder=3)
                    dense = np.geomspace(xs[0], xs[-1], 50)
                    power = fit.of_width if size == "d" else 0
                    curve = np.exp(np.mean(np.log(ys))) * (dense / np.exp(np.mean(np.log(xs)))) ** power
                    curve = curve if size == "d" else np.array([fit.line[0] + fit.line[1] * x for x in dense])
                    axis.plot(dense, curve, color=looks[stage]["color"], linewidth=0.7)
                    told = f"slope {fit.of_layers:.2f}"
                    if size == "d":
                        told = f"slope {fit.of_width:.2f}, expected {fit.expected:.2f}"
                    axis.text(
                        0.04, 0.985 - 0.075 * number, told, transform=axis.transAxes, va="top", fontsize=SMALL,
                        color=readable(looks[stage]["color"]),
                    )  # fmt: skip
                axis.set_xticks(xs, [str(x) for x in xs])
                axis.xaxis.set_minor_locator(NullLocator())
                low, high = axis.get_ylim()
                axis.set_ylim(low, high * (high / low) ** 0.45)
            for place, shape in enumerate(WHOLE.values()):
                for number, stage in enumerate(names):
                    x, ends = place + 0.2 * (number - (len(names) - 1) / 2), fits[stage, kind].at(shape)
                    colour = looks[stage]["color"]
                    whole.plot([x, x], ends, color=colour, linestyle="--", linewidth=0.8)
                    whole.plot([x], [ends[1]], **looks[stage], markerfacecolor="white", markersize=4.5)
                    whole.plot([x], [ends[0]], marker="_", color=colour, markersize=4.5)
                    whole.annotate(
                        said(ends[1], kind), (x, max(ends)), (0, 5), textcoords="offset points", rotation=90,
                        ha="center", va="bottom", fontsize=SMALL, color=readable(colour),
                    )  # fmt: skip
            low, high = whole.get_ylim()
            whole.set_ylim(low, high * (high / low) ** 0.4)
            whole.set_xlim(-0.55, len(WHOLE) - 0.45)
            whole.set_xticks(range(len(WHOLE)), [f"{m}\nL = {s.layers}, d = {s.width}" for m, s in WHOLE.items()])
            of_layers.set_ylabel({"seconds": "Processor seconds", "gib": "Peak memory, GiB"}[kind])
        titles = (
            f"Layers, d = {over['L'][0].width}",
            f"Width, L = {over['d'][0].layers}",
            "Extrapolated, not measured",
        )
        for axis, title in zip(canvas.axes[0], titles, strict=True):
            axis.set_title(title)
        for axis, label in zip(canvas.axes[1], ("Layers L", "Width d", ""), strict=True):
            axis.set_xlabel(label)
        handles = [Line2D([], [], **looks[stage], label=stage) for stage in names]
        handles.append(Line2D([], [], color="0.4", marker="D", linestyle="--", markerfacecolor="white",
                              label="extrapolated"))  # fmt: skip
        widest = over["d"][-1]
        figure = canvas.finish(
            "Calibration and closed-form compression: growth with layers and width",
            "Slopes: least squares on log-log axes; expected: of FLOPs, and d^2 of memory. Lines: a + b L, powers "
            f"of d. Right: from L = {widest.layers}, d = {widest.width} by the line in L and, for d, FLOPs or d^2 "
            "(marker and number), or the fitted power (dash). One thread, 512 tokens of calibration, attention "
            "reduced by 20 %, Matrix PCA without the option of dense layers.",
            handles=handles,
        )
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
