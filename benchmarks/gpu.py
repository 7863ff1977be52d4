"""All that is to be measured on a GPU, in one go: training steps, serving, calibration, a run killed and resumed.

    python benchmarks/gpu.py [--minutes 8] [--parts steps serving] [--tokens FOLDER] [--out results/benchmarks/gpu.json]

Needs Python 3.12, torch 2.11, transformers 5, accelerate, safetensors and numpy, and nothing of the study. Every part
is a process of its own with a share of the time; the JSON is written after each, and a part that fails is named there
and does not keep the next from running. --quick goes through all of it on small models, and on a CPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from masa.errors import MasaError
from masa.runs import card, run

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        command: script and arguments; OUT becomes a folder for its files.
        quick: arguments in their place with --quick.
        seconds: at most.
    """

    name: str
    command: tuple[str, ...]
    quick: tuple[str, ...]
    seconds: int


def step(name: str, seconds: int, *arguments: str) -> Part:
    out = ("--out", "OUT/steps.json")
    return Part(
        name,
        ("gpu_step.py", *arguments, *out),
        ("gpu_step.py", "--scales", "tiny", "--modes", "eager", "--steps", "2", *out),
        seconds,
    )


REST = ("gqa", "low-rank", "sequential", "repeat-all-over", "masa-qkv")
PARTS = (
    step("steps, S eager", 60, "--scales", "S", "--modes", "eager", "--profile"),
    step("steps, S compiled", 150, "--scales", "S", "--modes", "compiled", "--profile"),
    Part(
        "serving",
        ("serving.py", "--models", "Llama-3.2-1B", "--reductions", "50", "--rounds", "3", "--out", "OUT"),
        ("serving.py", "--quick", "--models", "Llama-3.2-1B", "--out", "OUT"),
        150,
    ),
    Part(
        "calibration",
        ("calibration_memory.py", "--gpu-only", "--out", "OUT"),
        ("calibration_memory.py", "--quick", "--out", "OUT"),
        90,
    ),
    Part("killed and resumed", ("gpu_resume.py",), ("gpu_resume.py", "--quick"), 150),
    step("steps, L eager", 90, "--scales", "L", "--modes", "eager", "--steps", "6"),
    step("steps, L compiled", 240, "--scales", "L", "--modes", "compiled", "--steps", "6"),
    step("steps, M eager", 90, "--scales", "M", "--modes", "eager", "--steps", "6"),
    step("steps, the other methods", 90, "--scales", "S", "--modes", "eager", "--methods", *REST),
)


def evidence(tokens: Path) -> Part:
    """What is left of the time, for the runs of the evidence."""
    arguments = ("gpu_evidence.py", "--tokens", str(tokens), "--out", "OUT/evidence.json")
    quick = (*arguments, "--quick", "--seeds", "1", "--methods", "vanilla", "--at-once", "1")
    return Part("evidence", (*arguments, "--minutes", "MINUTES"), quick, 3600)


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--minutes", type=float, default=8.0, help="after which no part begins or goes on")
    made.add_argument("--parts", nargs="+", help="only those whose names begin so, in this order")
    made.add_argument(
        "--tokens",
        type=Path,
        help="what gpu_evidence.py --prepare was given: then the evidence's runs, in what time is left",
    )
    made.add_argument("--quick", action="store_true", help="only show that it runs")
    made.add_argument("--out", type=Path, default=Path("results/benchmarks/gpu.json"))
    given = made.parse_args()
    parts = [*PARTS, evidence(given.tokens.resolve())] if given.tokens else PARTS
    chosen = [part for word in given.parts or [""] for part in parts if part.name.startswith(word)]
    if not chosen:
        raise SystemExit(f"--parts: none begins so. There are: {', '.join(part.name for part in parts)}.")
    result = about()
    end = time.monotonic() + 60 * given.minutes
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for part in chosen:
        left = end - time.monotonic()
        print(
            f"{part.name}: {max(0, left) / 60:.1f} of {given.minutes:g} minutes are left", file=sys.stderr, flush=True
        )
        result["parts"][part.name] = (
            outcome(part, given.quick, min((3 if given.quick else 1) * part.seconds, left))
            if left > 10
            else "no time left"
        )
        result["steps"] += result["parts"][part.name].pop("steps", []) if left > 10 else []
        share(result)
        run.write_json(given.out, result)
    print(json.dumps(result["parts"], indent=1)[-3000:])
    return 0


def about() -> dict[str, Any]:
    """The card and what runs on it."""
    used = card.used()
    return {
        "card": used["gpu"] or "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": used["driver"],
        "date": time.strftime("%Y-%m-%d"),
        "parts": {},
        "steps": [],
    }


def outcome(part: Part, quick: bool, seconds: float) -> dict[str, Any]:
    """What a part wrote, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"OUT": folder, "MINUTES": f"{max(0.1, seconds / 60 - 0.3):.2f}"}
        words = part.quick if quick else part.command
        script, *arguments = [re.sub("OUT|MINUTES", lambda found: places[found[0]], word) for word in words]
        started = time.monotonic()
        command = [sys.executable, str(HERE / script), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
            missed = done.returncode == 1 and any(path.suffix == ".csv" for path in Path(folder).iterdir())
            ended = "done" if not done.returncode else "done, with a target missed" if missed else ""
            ended = ended or f"failed with {done.returncode}: {done.stderr[-1500:]}"
            said = done.stdout
        except subprocess.TimeoutExpired as late:
            ended, said = f"stopped after {seconds:.0f} s", (late.stdout or b"").decode()
        found: dict[str, Any] = {"ended": ended, "seconds": round(time.monotonic() - started, 1)}
        for name, content in written(Path(folder)):
            found |= content if name == "steps" else {name: content}
        last = said.strip().splitlines()[-1:] or [""]
        if last[0].startswith("{") and "steps" not in found:
            found |= json.loads(last[0])
        return found


def written(folder: Path) -> Iterator[tuple[str, Any]]:
    """The JSON files and tables of a part."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            yield path.stem, run.read_json(path, "benchmarks/gpu.py")
        elif path.suffix == ".csv":
            yield f"{path.stem}_rows", path.read_text().splitlines()


def share(result: dict[str, Any]) -> None:
    """Each step's share of the card's own matrix rate, by the best that a part measured."""
    rates = [p["matrix_tflops"] for p in result["parts"].values() if isinstance(p, dict) and "matrix_tflops" in p]
    bandwidths = [p["bandwidth_gbs"] for p in result["parts"].values() if isinstance(p, dict) and "bandwidth_gbs" in p]
    if not rates:
        return
    result["matrix_tflops"], result["bandwidth_gbs"] = max(rates), max(bandwidths)
    for one in result["steps"]:
        if "tflops" in one:
            one["share"] = one["tflops"] / result["matrix_tflops"]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MasaError as error:
        raise SystemExit(str(error)) from None
