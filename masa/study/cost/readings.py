"""What was measured on a card: its rates, and how many tokens a second training steps reach on it.

A reading is a file ``results/reference/NAME/gpu.json``; the folder's name does not matter, ``card`` in the file does.
Whoever measures a card puts such a file there, and plans for that card use it; of two the later ``date`` counts.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from masa.errors import MasaError
from masa.runs.files import PROJECT
from masa.settings import Open, Positive, key, read
from masa.study import experiments
from masa.study.cost.devices import DEVICES, Device
from masa.study.cost.sizes import of_run
from masa.study.cost.training import MODES, Reach, flops_a_unit
from masa.training.peak import Peak

FOLDER = PROJECT / "results" / "reference"
STEP = 32
"""Sequences of a step whose FLOPs are counted; making the shared matrices is next to nothing in them."""

SAME = 0.01
"""Models whose FLOPs a token differ by less than this fraction are taken for the same."""

CREDIBLE = (0.75, 1.35)
"""Share by our count of FLOPs over the share that a step states, which may count 6 FLOPs a parameter alone. Outside
of it the configuration calls another model by that name."""


class Step(Open):
    """A training step that was timed: its tokens/s, or their ratio to vanilla's of the same scale and mode; neither of
    one that failed."""

    scale: str = key("A scale of the configuration.")
    method: str = key("An experiment of the configuration.")
    mode: Literal["eager", "compiled"] = key("Whether the step was compiled.")
    tokens_per_second: float | None = key("Of one card.", None, gt=0)
    share: float | None = key("Of matrix_tflops that this is.", None, gt=0)
    peak_memory_gib: float | None = key("Memory at the peak.", None, gt=0)
    ratio_to_vanilla: float | None = key("Its tokens/s : vanilla's.", None, gt=0)


class Together(Open):
    """Small runs that shared the card."""

    width: Positive = key("d of each.")
    runs: Positive = key("How many at once.")
    tokens_per_second: float = key("Of all of them.", gt=0)
    alone: float = key("Tokens/s of one that has the card to itself.", gt=0)


class Reading(Open):
    """The file."""

    card: str = key("Name of the card in CUDA.")
    date: str = key("When it was measured.", min_length=4)
    source: str | None = key("What measured it.", None)
    matrix_tflops: float = key("TFLOP/s of large matrix products in bfloat16.", gt=0)
    bandwidth_gbs: float | None = key("GB/s of its memory.", None, gt=0)
    context: Positive = key("Tokens a sequence.", 1024)
    steps: list[Step] = key("Training steps.")
    together: Together | None = key("Small runs that shared the card.", None)


@dataclass(frozen=True)
class Measured:
    """A file that was read: where it lies, and what :class:`Reading` says it holds, with defaults filled in."""

    file: Path
    data: Mapping[str, Any]

    @property
    def flops(self) -> float:
        """FLOP/s of matrix products in bfloat16."""
        return 1e12 * self.data["matrix_tflops"]

    @property
    def name(self) -> str:
        """The file, below the project where it lies there."""
        return str(self.file.relative_to(PROJECT) if self.file.is_relative_to(PROJECT) else self.file)


@functools.cache
def _all(folder: Path) -> tuple[Measured, ...]:
    found = []
    for file in sorted(folder.glob("*/gpu.json")):
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise MasaError(f"{file} is not valid JSON ({error}); measure the card again, or delete it.") from error
        read(Reading, data, f"{file}: ", str(file))
        found.append(Measured(file, Reading.defaults() | data))
    return tuple(found)


def of_card(pattern: str, folder: Path | None = None) -> Measured | None:
    """The latest reading of a card, None if there is none.

    Args:
        pattern: regular expression of its name in CUDA; "" is no card's.
        folder: where the files are; by default :data:`FOLDER`.

    Raises:
        MasaError: a file is not what :class:`Reading` says.
    """
    found = [one for one in _all(folder or FOLDER) if re.fullmatch(pattern, one.data["card"])]
    return max(found, key=lambda one: one.data["date"], default=None)


class Paces:
    """What training steps of language models reach on a card: as measured, or as vanilla does at the nearest sizes.

    Args:
        reading: of the card.
        config: checked; a reading's scales and methods are its own.

    Attributes:
        reached_at: mode -> experiment -> FLOPs a token -> FLOP/s of one card, by our count of FLOPs.
        vanilla: mode -> scale -> FLOP/s of one card, of vanilla.
        others: scales that are other models here than when they were measured.
    """

    def __init__(self, reading: Measured, config: Mapping[str, Any]) -> None:
        self.reading = reading
        self.reached_at: dict[str, dict[str, dict[float, float]]] = {}
        self.vanilla: dict[str, dict[str, float]] = {}
        self.others: list[str] = []
        steps = reading.data["steps"]
        speeds = {(e["scale"], e["mode"]): e.get("tokens_per_second") for e in steps if e["method"] == "vanilla"}
        for step in steps:
            if not config["scales"].get(step["scale"]) or step["method"] not in config["experiments"]:
                continue
            speed = step.get("tokens_per_second")
            if not speed and step.get("ratio_to_vanilla"):
                speed = (speeds.get((step["scale"], step["mode"])) or 0.0) * step["ratio_to_vanilla"]
            if speed:
                self._add(config, step, speed)

    def _add(self, config: Mapping[str, Any], step: Mapping[str, Any], speed: float) -> None:
        scale, method, mode, stated = step["scale"], step["method"], step["mode"], step.get("share")
        context = self.reading.data["context"]
        recipe = {"context": context, "batch_size": STEP, "micro_batch_size": STEP, "tokens": STEP * context}
        recipe |= {"nodes": 1, "processes_per_node": 1}  # of one card, whatever the configuration's own recipe is
        alone = config["scales"][scale] | {"training": recipe}
        spec = experiments.run_spec({**config, "scales": {scale: alone}}, scale, method, 0)
        flops = flops_a_unit(spec["training"], of_run(spec))
        rate = speed * flops
        if stated and not CREDIBLE[0] < rate / self.reading.flops / stated < CREDIBLE[1]:
            self.others.append(scale)
            return
        self.reached_at.setdefault(mode, {}).setdefault(method, {})[flops] = rate
        if method == "vanilla":
            self.vanilla.setdefault(mode, {})[scale] = rate

    def reached(self, method: str, mode: str, flops: float) -> Reach | None:
        """What the steps of a model reach on one card.

        Args:
            method: experiment.
            mode: how the steps will run; where nothing was measured in it, the other one stands for it.
            flops: a token, :func:`masa.study.cost.training.flops_a_unit`.

        Returns:
            What was measured of this method at these sizes; else what vanilla reaches there: between two sizes that
            were measured on a line over the logarithm of FLOPs, and outside of them as the nearest. None without any.
        """
        for one in (mode, *MODES):
            if found := self._in_mode(method, one, flops):
                return found
        return None

    def _in_mode(self, method: str, mode: str, flops: float) -> Reach | None:
        known = self.reached_at.get(mode, {})
        for size, rate in known.get(method, {}).items():
            if abs(size / flops - 1) < SAME:
                return Reach(rate, mode)
        points = sorted(known.get("vanilla", {}).items())
        if not points:
            return None
        below = max((p for p in points if p[0] <= flops), default=points[0])
        above = min((p for p in points if p[0] >= flops), default=points[-1])
        way = math.log(flops / below[0]) / math.log(above[0] / below[0]) if above[0] > below[0] else 0.0
        return Reach(below[1] + way * (above[1] - below[1]), "", flops < (1 - SAME) * points[0][0])


def paces(device: Device, config: Mapping[str, Any], folder: Path | None = None) -> Paces | None:
    """What was measured on a device; None of a CPU, and of a GPU of which there is no reading."""
    reading = of_card(device.cards, folder) if device.cards else None
    return Paces(reading, config) if reading else None


def peak(spec: Mapping[str, Any], card: str, folder: Path | None = None) -> Peak | None:
    """What a training's speed is a share of: the rate that was measured on a card, else its data sheet's.

    Args:
        spec: a resolved run.
        card: its name in CUDA.

    Returns:
        None of a card that is neither in a reading nor in :data:`masa.study.cost.devices.DEVICES`.
    """
    sheet = next((d.sheet_flops for d in DEVICES.values() if d.cards and re.fullmatch(d.cards, card)), {})
    try:
        reading = of_card(re.escape(card), folder)
        rates = {**sheet} | ({"bfloat16": reading.flops} if reading else {})
        return Peak(flops_a_unit(spec["training"], of_run(spec)), rates) if rates else None
    except (MasaError, LookupError, TypeError, ValueError):  # no reason for a training not to begin
        return None
