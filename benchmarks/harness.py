"""What every benchmark here has in common: ways timed in turn, peak memory, and a file of what was found.

A ratio is the median, over rounds, of two times of the same round, and every other round goes through the ways
backwards: a machine that is slow for a while is slow to all of them. On a CPU it is processor time that counts, so
that other work on the machine matters less.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from masa.runs import memory, run
from masa.runs.progress import Progress

OUT = Path("results/benchmarks")
COLUMNS = ["benchmark", "what", "value", "spread", "unit", "target", "met"]


@dataclass(frozen=True)
class Row:
    """One number that was measured.

    Attributes:
        spread: half the distance between the quartiles over rounds, in the same unit.
        target: ``>= 0.97``, ``<= 3`` or ``0.98 to 1.02``; empty where there is none.
    """

    what: str
    value: float
    unit: str = "ratio"
    spread: float | None = None
    target: str = ""

    @property
    def met(self) -> str:
        """yes, no, or nothing where there is no target; of the value rounded to two decimals."""
        if not self.target:
            return ""
        low, high = _limits(self.target)
        return "yes" if low <= round(self.value, 2) <= high else "no"


def _limits(target: str) -> tuple[float, float]:
    numbers = [float(n) for n in re.findall(r"[\d.]+", target)]
    if " to " in target:
        return numbers[0], numbers[1]
    return (numbers[0], float("inf")) if target.startswith(">=") else (float("-inf"), numbers[0])


@dataclass(frozen=True)
class Timed:
    """Seconds of every way, one a round, in the order of the rounds."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Seconds of one way."""
        return statistics.median(self.seconds[name])

    def speed(self, what: str, name: str, reference: str, target: str = "") -> Row:
        """How many times as fast as the reference a way is."""
        found = [r / s for r, s in zip(self.seconds[reference], self.seconds[name], strict=True)]
        return Row(what, statistics.median(found), "ratio", _spread(found), target)


def _spread(values: Sequence[float]) -> float | None:
    if len(values) < 4:
        return None
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def in_turn(
    name: str,
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] | None = None,
) -> Timed:
    """Call every way once a round, ``rounds`` times after ``warm_up`` rounds that do not count.

    Args:
        clock: ``time.perf_counter`` where several threads or other processes do the work.
    """
    usual, wait = _clock()
    clock = clock or usual
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    progress = Progress(name, rounds + warm_up, "rounds")
    for number in range(rounds + warm_up):
        for way in list(ways) if number % 2 else reversed(list(ways)):
            started = clock()
            ways[way]()
            wait()
            if number >= warm_up:
                seconds[way].append(clock() - started)
        progress.update(number + 1)
    progress.close(rounds + warm_up)
    return Timed(seconds)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent of the power law through the points, by least squares of logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _clock() -> tuple[Callable[[], float], Callable[[], Any]]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return time.perf_counter, torch.cuda.synchronize
    return time.process_time, lambda: None


def apart(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a process of its own, forked from this one."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(work()))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise SystemExit("a process that measured has failed; what it said stands above") from None
    finally:
        process.join()


def peak_bytes(work: Callable[[], Callable[[], Any]]) -> int:
    """Resident memory that a process of its own needs beyond what it starts with (Linux).

    Args:
        work: prepares, in that process, and returns what is then called twice. What it prepares counts as well.
    """

    def measured() -> int:
        before = status_bytes("VmRSS")
        step = work()
        for _ in range(2):
            step()
        return status_bytes("VmHWM") - before

    Path("/proc/self/clear_refs").write_text("5")  # a child inherits the high-water mark
    return apart(measured)


def status_bytes(key: str) -> int:
    """A line of /proc/self/status, e.g. VmRSS or VmHWM (Linux)."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line with ``--out`` and ``--quick``."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, default=OUT, help=f"folder of the tables (default {OUT})")
    made.add_argument("--quick", action="store_true", help="smallest sizes, few rounds; numbers mean nothing")
    return made


def save(name: str, rows: Sequence[Row], settings: Mapping[str, Any], out: Path) -> int:
    """Print what was found, and write ``name.csv`` and, with what it was made with, ``name.json``.

    Returns:
        0, or 1 where a target was missed: the exit status.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for row in rows:
            spread = "" if row.spread is None else f"{row.spread:.2g}"
            table.writerow([name, row.what, f"{row.value:.4g}", spread, row.unit, row.target, row.met])
    run.write_json(out / f"{name}.json", {"settings": dict(settings), "provenance": run.provenance({})})
    for row in rows:
        spread = "" if row.spread is None else f" ± {row.spread:.2g}"
        target = f"   (target {row.target}: {row.met})" if row.target else ""
        print(f"{row.what}: {row.value:.4g}{spread} {row.unit}{target}")
    print(f"{out / f'{name}.csv'}; peak memory of this process {memory.peak()}")
    return int(any(row.met == "no" for row in rows))
