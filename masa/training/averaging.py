"""The mean of the weights over the end of a training, which is then the model that is scored last and kept.

A training's end is noisy: another order of the last batches gives other weights. Their mean over the last steps
(Izmailov et al., 2018, arXiv 1803.05407) takes part of that noise off, and so off the comparison of two methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback


class TailAverage(TrainerCallback):
    """Mean of all parameters after each of the last steps, in single precision or better, kept with every checkpoint.

    Atoms and coefficients are averaged each, so the mean is a model of the same sharing. Buffers are left alone.

    Args:
        steps: of the training.
        fraction: of them, at the end, rounded up; 0: nothing is averaged.
    """

    FILE = "tail-average.safetensors"

    def __init__(self, steps: int, fraction: float) -> None:
        self.last = steps
        self.first = steps - min(steps, int(-(-steps * fraction // 1))) + 1
        self.count, self.mean = 0, dict[str, Tensor]()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE
        if state.global_step >= self.first:
            where = {name: p.device for name, p in model.named_parameters()}
            self.mean = {name: t.to(where[name]) for name, t in load_file(file).items()}
            self.count = state.global_step - self.first + 1

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if not self.first <= state.global_step <= self.last:
            return
        self.count += 1
        for name, p in model.named_parameters():
            exact = p.detach().to(torch.promote_types(p.dtype, torch.float32))
            if self.count == 1:
                self.mean[name] = exact.clone()
            else:
                self.mean[name] += (exact - self.mean[name]) / self.count

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.count and state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_file({name: t.contiguous() for name, t in self.mean.items()}, folder / self.FILE)

    @property
    def whole(self) -> bool:
        """Whether all steps that are averaged have been."""
        return self.count == self.last - self.first + 1

    @torch.no_grad()
    def final(self, model: nn.Module) -> nn.Module:
        """The model; after the last step, with the mean in the place of its weights."""
        if self.whole:
            for name, p in model.named_parameters():
                p.copy_(self.mean[name.removeprefix("module.")])
        return model


def of(recipe: Mapping[str, Any]) -> TailAverage | None:
    """What a recipe asks for."""
    fraction = recipe.get("average_fraction", 0.0)
    return TailAverage(recipe["steps"], fraction) if fraction else None
