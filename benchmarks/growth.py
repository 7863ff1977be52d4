"""How a training step of MASA-QKVO grows with the atoms S, the layers L, the width d and the tokens a step.

    python benchmarks/growth.py

Each of the four is varied alone from one base (L = 12, d = 64, S = 4, 8 sequences of 128 tokens, a vocabulary of 512,
one thread). Time is processor seconds of one optimiser step (forward, backward, clipping, AdamW), all sizes in turn,
the median over rounds. Memory is what a process of its own needs at its peak, model and optimiser included, less what
the smallest model needs in the same way: the libraries' own. At the base S costs next to nothing, since atoms are mixed
once for all tokens; so S is varied a second time where it counts most, in wider matrices and with few tokens.

A slope is that of least squares through the points on log-log axes. The expected one is the same of the arithmetic of
masa.study.cost at the same sizes, nothing of which was fitted to these points: FLOPs, elements and operators, weighed
by the rates of the plan's standard CPU, and bytes of weights, moments and activations.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Row, Timed, in_turn, parser, peak_bytes, save, slope

from masa.models import language
from masa.runs.memory import keep_freed
from masa.sharing.parameters import parameter_groups
from masa.study.cost import transformer
from masa.study.cost.devices import DEVICES
from masa.study.cost.sizes import Sizes, of_run

VOCABULARY, CONTEXT, OF_HEAD = 512, 128, 16
RECIPE = {"learning_rate": 1e-3, "weight_decay": 0.1, "coefficients_learning_rate_ratio": 1.0}
KINDS = {"time": "s", "memory": "MiB"}
MIB = 2**20
LOOSE = 0.3
"""How far a slope may be from the expected one: overheads and caches count, a wrong power does not pass."""


@dataclass(frozen=True)
class Setting:
    """One size of model and batch."""

    atoms: int = 4
    layers: int = 12
    width: int = 64
    sequences: int = 8

    @property
    def spec(self) -> dict[str, Any]:
        """As a resolved run has it."""
        return {
            "model": {
                "num_layers": self.layers,
                "hidden_size": self.width,
                "num_attention_heads": self.width // OF_HEAD,
                "intermediate_size": 4 * self.width,
                "vocab_size": VOCABULARY,
            },
            "sharing": {"method": "masa", "projections": "qkvo", "atoms": self.atoms},
            "training": {"context": CONTEXT},
        }

    @property
    def sizes(self) -> Sizes:
        """What the cost model reads."""
        return of_run(self.spec)

    def expected(self, kind: str) -> float:
        """Seconds or MiB by arithmetic; only ratios of them are used."""
        if kind == "memory":
            return transformer.training_bytes(self.sizes, self.sequences, "float32") / MIB
        work = transformer.training_pass(self.sizes, self.sequences) + transformer.optimiser_step(self.sizes)
        loop = transformer.Work(launches=-transformer.STEP_OPERATORS)  # of the Trainer, which does not run here
        return (work + loop).seconds(DEVICES["cpu"])

    def step(self) -> Callable[[], None]:
        """Build the model; what is returned takes one optimiser step."""
        torch.manual_seed(0)
        model = language.build(self.spec["model"], self.spec["sharing"], CONTEXT).train()
        optimiser = torch.optim.AdamW(parameter_groups(model, RECIPE), fused=True)
        ids = torch.randint(0, VOCABULARY, (self.sequences, CONTEXT))

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        return step


BASE, WIDE, LEAST = Setting(), Setting(width=256, sequences=1), Setting(1, 1, OF_HEAD, 1)


@dataclass(frozen=True)
class Sweep:
    """One size varied alone."""

    what: str
    field: str
    values: Sequence[int]
    base: Setting = BASE

    @property
    def settings(self) -> list[Setting]:
        return [replace(self.base, **{self.field: value}) for value in self.values]

    @property
    def quick(self) -> Sweep:
        """The base and its neighbour."""
        first = max(0, self.values.index(getattr(self.base, self.field)) - 1)
        return replace(self, values=self.values[first : first + 2])

    @property
    def xs(self) -> list[int]:
        """What the horizontal axis says: tokens, not sequences."""
        return [value * (CONTEXT if self.field == "sequences" else 1) for value in self.values]


SWEEPS = (
    Sweep("atoms S", "atoms", (1, 2, 4, 8, 12)),
    Sweep("atoms S at d = 256, 128 tokens", "atoms", (1, 2, 4, 8, 12), WIDE),
    Sweep("layers L", "layers", (4, 8, 12, 24, 48)),
    Sweep("width d", "width", (64, 128, 256, 512)),
    Sweep("tokens a step", "sequences", (4, 8, 16, 32, 64)),
)


def main() -> int:
    given = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    sweeps = [sweep.quick for sweep in SWEEPS] if given.quick else SWEEPS
    settings = list(dict.fromkeys(setting for sweep in sweeps for setting in sweep.settings))
    # memory first: a process that has trained would hand down memory that it has freed. Without this import, the first
    # use of the model's code would count as well
    language.build(BASE.spec["model"], BASE.spec["sharing"], CONTEXT)(input_ids=torch.zeros(1, 8, dtype=torch.long))
    least = peak_bytes(LEAST.step) / MIB
    memory = {setting: peak_bytes(setting.step) / MIB - least for setting in settings}
    print(f"the smallest model's {least:.1f} MiB are taken off all memory")
    rounds = 1 if given.quick else 4
    ways = {str(setting): setting.step() for setting in settings}
    settle()
    timed = in_turn("growth", ways, rounds, warm_up=0 if given.quick else 2)
    measured = {"time": {setting: timed.median(str(setting)) for setting in settings}, "memory": memory}
    rows = []
    for kind, unit in KINDS.items():
        for sweep in sweeps:
            found, expected = slopes(sweep, measured[kind], kind)
            values = zip(sweep.xs, sweep.settings, strict=True)
            print(f"{sweep.what}, {kind}:", ", ".join(f"{x} {measured[kind][s]:.3g} {unit}" for x, s in values))
            name = f"{kind} of a step against {sweep.what}"
            target = f"{expected - LOOSE:.2f} to {expected + LOOSE:.2f}" if expected > LOOSE else f"<= {LOOSE}"
            of_rounds = spread(sweep, timed) if kind == "time" else None
            rows.append(Row(f"{name}: slope measured", found, "slope", of_rounds, "" if given.quick else target))
            rows.append(Row(f"{name}: slope expected", expected, "slope"))
    given.out.mkdir(parents=True, exist_ok=True)
    draw(sweeps, measured, given.out / "growth.png")
    points = {
        kind: {sweep.what: {x: found[s] for x, s in zip(sweep.xs, sweep.settings, strict=True)} for sweep in sweeps}
        for kind, found in measured.items()
    }
    about = {"base": BASE.spec | {"sequences": BASE.sequences}, "rounds": rounds, "threads": 1, "points": points}
    return save("growth", rows, about, given.out)


def settle() -> None:
    """What one step of one size does must not depend on which came before it, as in a training it does not.

    Freed memory is kept, as in a training; and the garbage collector has nothing to do with models that wait.
    """
    gc.collect()
    gc.freeze()
    keep_freed()


def slopes(sweep: Sweep, measured: dict[Setting, float], kind: str) -> tuple[float, float]:
    """Of the points, and of the arithmetic at the same places."""
    return (
        slope(sweep.xs, [measured[setting] for setting in sweep.settings]),
        slope(sweep.xs, [setting.expected(kind) for setting in sweep.settings]),
    )


def spread(sweep: Sweep, timed: Timed) -> float | None:
    """Half the distance between the quartiles of the slopes of single rounds."""
    rounds = np.array([timed.seconds[str(setting)] for setting in sweep.settings]).T
    if len(rounds) < 4:
        return None
    low, high = np.quantile([slope(sweep.xs, one) for one in rounds], [0.25, 0.75])
    return float(high - low) / 2


def draw(sweeps: Sequence[Sweep], measured: dict[str, dict[Setting, float]], path: Path) -> None:
    """Time and memory over each of the four sizes, both axes logarithmic, one scale a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullLocator

    from masa.report.canvas import Canvas
    from masa.report.style import BLUE, SMALL, STYLE, TEXT, VERMILLION, readable

    panels = {"atoms": "Atoms S", "layers": "Layers L", "width": "Width d", "sequences": "Tokens a step"}
    with plt.rc_context(STYLE):
        canvas = Canvas(TEXT, 3.9, 2, 4, sharey="row", sharex="col")
        for row, kind in zip(canvas.axes, KINDS, strict=True):
            row[0].set_ylabel({"time": "Processor seconds a step", "memory": "Peak memory, MiB"}[kind])
            for axis, field in zip(row, panels, strict=True):
                axis.set(xscale="log", yscale="log")
                for sweep in (s for s in sweeps if s.field == field):
                    second = sweep.base is not BASE
                    colour = VERMILLION if second else BLUE
                    at, xs = sweep.settings.index(sweep.base), sweep.xs
                    scale = measured[kind][sweep.base] / sweep.base.expected(kind)
                    axis.plot(xs, [scale * s.expected(kind) for s in sweep.settings], color="0.4", linewidth=0.7)
                    ys = [measured[kind][s] for s in sweep.settings]
                    axis.plot(xs, ys, "s" if second else "o", color=colour)
                    axis.plot(xs[at], ys[at], "s" if second else "o", color=colour, markersize=6, fillstyle="none")
                    found, expected = slopes(sweep, measured[kind], kind)
                    axis.text(
                        0.05, 0.97 - (0.24 if not second and field == "atoms" else 0),
                        f"slope {_signed(found)},\nexpected {_signed(expected)}",
                        transform=axis.transAxes, va="top", fontsize=SMALL, color=readable(colour),
                    )  # fmt: skip
                    axis.set_xticks(xs, [f"{x // 1024}k" if x >= 1024 else str(x) for x in xs])
                axis.xaxis.set_minor_locator(NullLocator())
                axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
                axis.tick_params(which="minor", length=0, labelleft=False)
                axis.margins(x=0.1)
        for kind, row in zip(KINDS, canvas.axes, strict=True):
            top = max(measured[kind].values())
            row[0].set_ylim(0.8 * min(measured[kind].values()), top * (top / min(measured[kind].values())) ** 0.35)
        for axis, label in zip(canvas.axes[1], panels.values(), strict=True):
            axis.set_xlabel(label)
        handles = [
            Line2D([], [], color=BLUE, marker="o", linestyle="", label="from the base (ringed)"),
            Line2D([], [], color=VERMILLION, marker="s", linestyle="", label="S at d = 256, 128 tokens"),
            Line2D([], [], color="0.4", linewidth=0.7, label="arithmetic of the cost model, through the ringed point"),
        ]
        figure = canvas.finish(
            "A training step of MASA-QKVO: what it costs as each size grows alone",
            "Base: L = 12, d = 64, S = 4, 8 x 128 tokens, vocabulary 512, float32, one thread. Slopes: least squares "
            "on log-log axes, of the points and of the arithmetic at the same sizes.",
            handles=handles,
        )
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
    print(path)


def _signed(number: float) -> str:
    return f"{number:.2f}".replace("-0.00", "0.00").replace("-", "\u2212")


if __name__ == "__main__":
    sys.exit(main())
