"""Our training loop against a minimal one: tokens a second of the same model, batches and precision.

    python benchmarks/training_loop.py [--quick]

Ours is Hugging Face's Trainer with our callbacks, log and watch (`masa.training.trainer`). The minimal loop is written
here: a batch, forward, backward, clipping, AdamW. After every step of ours one step of the minimal loop is made, in the
same process, so both meet the same machine; evaluation and checkpoints are in neither.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Row, Timed, parser, save
from torch import nn
from transformers import TrainerCallback

from masa.data.tokens import PackedTokens
from masa.models import language
from masa.runs import run
from masa.sharing.parameters import parameter_groups
from masa.study import config, experiments
from masa.training import trainer

SIZES = {"nano": {}, "wide": {"hidden_size": 144, "intermediate_size": 576}}
"""Changes to the default configuration's model."""
STEPS = {"nano": 120, "wide": 30}
VANILLA = {"method": "vanilla"}


class Beside(TrainerCallback):
    """After every step of the Trainer, one of the minimal loop; seconds of both."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step = step
        self.seconds: dict[str, list[float]] = {"ours": [], "minimal": []}
        self.ended: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        began = time.process_time()
        if self.ended is not None:
            self.seconds["ours"].append(began - self.ended)
        self.step()
        self.ended = time.process_time()
        self.seconds["minimal"].append(self.ended - began)


def minimal(spec: Mapping[str, Any], data: PackedTokens) -> Callable[[], None]:
    """The whole of a loop that trains as ours does, without learning rates that change."""
    recipe, size = spec["training"], spec["training"]["batch_size"]
    model = language.build(spec["model"], VANILLA, recipe["context"]).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), fused=True)
    parameters = list(model.parameters())
    batches = iter(range(0, len(data), size))

    def step() -> None:
        first = next(batches)
        ids = torch.stack([data[item]["input_ids"] for item in range(first, first + size)])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(parameters, recipe["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def token_files(folder: Path, tokens: int, vocabulary: int) -> None:
    """A token directory of random tokens."""
    ids = np.random.default_rng(0).integers(0, vocabulary, tokens).astype("<u2")
    ids.tofile(folder / "train-00000.bin")
    ids[:1].tofile(folder / "validation.bin")
    record = {"name": "train-00000.bin", "tokens": tokens}
    held_out = {"name": "validation.bin", "tokens": 1}
    whole = {"vocab_size": vocabulary, "tokenizer": "", "dtype": "<u2"}
    run.write_json(folder / "manifest.json", whole | {"train": {"shards": [record]}, "validation": held_out})


def measure(size: str, steps: int) -> Row:
    """Train for some steps and compare."""
    spec = experiments.run_spec(config.load(), "nano", "vanilla", 0)
    spec["model"] |= SIZES[size]
    spec["training"] |= {"steps": steps, "evaluations": 1}
    recipe = spec["training"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        items = recipe["batch_size"] * steps
        token_files(folder, items * recipe["context"], spec["model"]["vocab_size"])
        data = PackedTokens(folder, recipe["context"], items, 0)
        trainer.set_up(spec)
        beside = Beside(minimal(spec, data))
        task = trainer.Task(
            build=lambda: language.build(spec["model"], VANILLA, recipe["context"]),
            data=data,
            score=lambda model: {"validation_loss": 0.0},
            unit="tokens",
            units_per_step=recipe["batch_size"] * recipe["context"],
            inputs={},
            identity="",
            callbacks=[beside],
        )
        trainer.train(spec, task, folder / "run")
    warm = 3
    timed = Timed({"ours": beside.seconds["ours"][warm:], "minimal": beside.seconds["minimal"][warm + 1 :]})
    width = spec["model"]["hidden_size"]
    return timed.speed(f"training loop, ours : minimal, d = {width}", "ours", "minimal", ">= 0.97")


def main() -> int:
    given = parser(__doc__).parse_args()
    rows = [measure(size, 5 if given.quick else STEPS[size]) for size in SIZES]
    return save("training_loop", rows, {"threads": 1, "steps": STEPS}, given.out)


if __name__ == "__main__":
    sys.exit(main())
