"""A training stopped by a signal and gone on with, beside one that was left alone: are the weights the same bits?

    python benchmarks/gpu_resume.py [--quick]

Each training is a process of its own, eager and compiled, MASA at the evidence's width on random tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from gpu_step import CONTEXT, RECIPE, Tokens
from torch import nn
from transformers import TrainerCallback

from masa.errors import Interrupted
from masa.models import language
from masa.runs.run import read_json
from masa.training import trainer
from masa.training.attention import without_mask

MODEL = {"num_layers": 6, "hidden_size": 128, "intermediate_size": 512, "vocab_size": 32000, "num_attention_heads": 4}
STOPPED = 75


class Stop(TrainerCallback):
    """SIGTERM to this very process after some steps."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def train(out: Path, steps: int, compiled: bool, stop: int) -> None:
    """One process."""
    spec = {"run": "tiny/masa-qkvo/seed0", "seed": 0}
    own = {"steps": steps, "learning_rate": 1e-3, "warmup_fraction": 0.1, "threads": 1, "compile": compiled}
    spec["training"] = RECIPE | own | {"batch_size": 8, "micro_batch_size": 4}
    trainer.set_up(spec)

    def build() -> nn.Module:
        sharing = {"method": "masa", "projections": "qkvo", "atoms": 2}
        return without_mask(language.build(MODEL, sharing, CONTEXT))

    torch.manual_seed(1)
    task = trainer.Task(
        build=build,
        data=Tokens(8 * steps, MODEL["vocab_size"]),
        score=lambda model: {"validation_loss": 0.0},
        unit="tokens",
        units_per_step=8 * CONTEXT,
        inputs={},
        identity="resume",
        callbacks=[Stop(stop)] if stop else [],
    )
    trainer.train(spec, task, out)


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--quick", action="store_true", help="only show that it runs")
    made.add_argument("--one", nargs=4, metavar=("OUT", "STEPS", "COMPILED", "STOP"), help=argparse.SUPPRESS)
    given = made.parse_args()
    if given.quick:
        MODEL.update(num_layers=2, hidden_size=64, intermediate_size=128, vocab_size=512)
    if given.one:
        out, steps, compiled, stop = given.one
        try:
            train(Path(out), int(steps), compiled == "1", int(stop))
        except Interrupted:
            return STOPPED
        return 0
    steps = 4 if given.quick else 40
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        ways = {"eager": False} if given.quick else {"eager": False, "compiled": True}
        threads = [
            threading.Thread(target=lambda n=n, c=c: found.update({n: same(Path(folder) / n, steps, c)}))
            for n, c in ways.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    print(json.dumps({"the same bits": found}))
    return 0 if all(value is True for value in found.values()) else 1


def same(folder: Path, steps: int, compiled: bool) -> bool | str:
    """Whether both ways end on one sha256, or what went wrong."""

    def one(name: str, stop: int = 0) -> int:
        arguments = ["--one", str(folder / name), str(steps), str(int(compiled)), str(stop), *sys.argv[1:]]
        return subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.DEVNULL).returncode

    codes = [one("whole"), one("stopped", steps // 2), one("stopped")]
    if codes != [0, STOPPED, 0]:
        return f"exit statuses {codes}, expected {[0, STOPPED, 0]}"
    shas = [read_json(folder / name / "manifest.json", "")["sha256"] for name in ("whole", "stopped")]
    return shas[0] == shas[1]


if __name__ == "__main__":
    sys.exit(main())
