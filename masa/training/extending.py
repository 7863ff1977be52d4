"""Training on: a finished run's model, further steps of the same data, a schedule of its own, all of it recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from masa.errors import MasaError
from masa.runs import run
from masa.runs.files import verify
from masa.sharing import checkpoint

SAME = ("model", "sharing", "seed", "training.batch_size", "training.context")
"""What an extension has in common with the run that it trains on: the model, and the order of the data."""


class Later(Dataset):
    """The items of some data from one of them on."""

    def __init__(self, data: Any, first: int) -> None:
        self.data, self.first = data, first

    def __len__(self) -> int:
        return len(self.data) - self.first

    def __getitem__(self, item: int) -> Any:
        return self.data[item + self.first]

    def where(self, items: range) -> str:
        """Which data a range of items are, for messages."""
        shifted = range(items.start + self.first, items.stop + self.first)
        return self.data.where(shifted) if hasattr(self.data, "where") else f"items {shifted.start} to {shifted[-1]}"


def extended(spec: Mapping[str, Any], task: Any, directory: Path) -> tuple[dict[str, Any], Any]:
    """What trains a finished run on to the steps that a spec asks for.

    The steps that are left begin with the finished run's weights and the data after those that it saw. Its schedule has
    ended, so the learning rate warms up and falls again, over these steps alone and as the spec says; the optimiser
    begins without moments, which a finished run does not keep.

    Args:
        spec: resolved; its ``training.steps`` count those of the finished run, too.
        task: of the spec (:class:`masa.training.trainer.Task`).
        directory: of the finished run, which is only read.

    Returns:
        The spec with the steps that are left and, under ``extends``, what they go on from; and its task.

    Raises:
        MasaError: no finished run, a damaged one, another model, seed or batch, or no more steps than it has.
    """
    manifest = run.read_json(directory / "manifest.json", "masa pretrain")
    parent = run.read_json(directory / "spec.json", "masa pretrain")
    sums = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(sums, dict) or not isinstance(parent, dict) or not isinstance(parent.get("training"), dict):
        raise MasaError(f"--extend {directory} is no finished training.")
    verify(directory / "model", sums, "an extension needs the model as it was stored; train it again with --restart")
    recipe = spec["training"]
    for key in SAME:
        pair = [_at(given, key) for given in (parent, spec)]
        if pair[0] != pair[1]:
            raise MasaError(
                f"{spec['run']}: --extend trains on with the same {key}: {directory} has {pair[0]}, asked for is "
                f"{pair[1]}."
            )
    done = parent["training"]["steps"] + parent.get("extends", {}).get("steps", 0)
    left = recipe["steps"] - done
    if left < 1:
        raise MasaError(
            f"{spec['run']}: {directory} has {done:,} steps already, and {recipe['steps']:,} are asked for. Ask for "
            "more (training.tokens, training.epochs or training.steps)."
        )
    warmup = math.ceil(recipe["warmup_fraction"] * left)
    extends = {
        "run": manifest["run"],
        "identity": manifest["identity"],
        "sha256": sums["model.safetensors"],
        "steps": done,
        "schedule": f"{warmup:,} steps of warmup to {recipe['learning_rate']:g}, then cosine to "
        f"{recipe['min_learning_rate_ratio']:g} of it at step {left:,}; the optimiser begins without moments",
    }
    build, first = task.build, done * recipe["batch_size"]
    spec = {**spec, "training": {**recipe, "steps": left}, "extends": extends}
    task = replace(
        task,
        build=lambda: _with_weights(build(), directory / "model"),
        data=Later(task.data, first),
        inputs={**task.inputs, "extends": manifest["identity"]},
        identity=run.digest([task.identity, extends]),
    )
    return spec, task


def _at(spec: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        spec = spec.get(part) if isinstance(spec, Mapping) else None  # type: ignore[assignment]
    return spec


def _with_weights(model: nn.Module, folder: Path) -> nn.Module:
    """A model with the weights that a folder holds.

    Raises:
        MasaError: the folder holds less, as of coefficients whose MLP is not stored.
    """
    found = checkpoint.load(folder, runtime="factored").state_dict()
    lacks, more = model.load_state_dict(found, strict=False)
    tied = {id(parameter) for name, parameter in model.state_dict(keep_vars=True).items() if name in found}
    lacks = [name for name in lacks if id(model.state_dict(keep_vars=True)[name]) not in tied]
    if lacks or more:
        raise MasaError(
            f"{folder} cannot be trained on: it {'does not hold' if lacks else 'also holds'} {(lacks or more)[0]}, "
            "which a finished model does not need and its training does."
        )
    return model
