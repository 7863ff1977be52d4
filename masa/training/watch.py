"""Stop a training whose numbers are not finite any more, at the step and with the batch where it began."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from masa.errors import MasaError
from masa.sharing.saving import as_trained

MEND = (
    "Lower training.learning_rate or training.max_grad_norm and add --restart, or look at that data; the last "
    "checkpoint before it, if there is one, is kept."
)


class Watch:
    """Looks at the loss and gradient norm of every step, before the weights are changed where that costs nothing.

    On a CPU a bad number stops the run at once. On a GPU, where looking would stop the queue of kernels at every step,
    the first bad step is remembered on the device and :meth:`check` looks at it: before every line of the log, score,
    checkpoint and the end.

    Args:
        run: its name.
        batch: describes the batch of a step, which is counted from 1.
        at_once: by default on a CPU.
    """

    def __init__(self, run: str, batch: Callable[[int], str], device: torch.device, at_once: bool | None = None):
        self.run, self.batch, self.device = run, batch, device
        self.at_once = device.type == "cpu" if at_once is None else at_once
        self.first = torch.zeros(3, dtype=torch.float64, device=device)  # step (0: none), loss, gradient norm

    def look(self, step: int, loss: Tensor, norm: Tensor | float) -> None:
        """Look at one step's loss (or a sum over steps, which stays infinite or NaN) and gradient norm."""
        if self.at_once:
            found = float(loss), float(norm)
            if not all(map(math.isfinite, found)):
                self._stop(step, *found)
            return
        with torch.no_grad():
            made = [
                torch.full((), x, device=self.device) if isinstance(x, int | float) else x for x in (step, loss, norm)
            ]
            now = torch.stack([x.detach().double().reshape(()) for x in made])
            bad = ~torch.isfinite(now).all() & (self.first[0] == 0)
            self.first = torch.where(bad, now, self.first)

    def check(self) -> None:
        """Stop if a step was bad.

        Raises:
            MasaError: it was; the message names the step and its batch.
        """
        if self.at_once:
            return
        step, loss, norm = self.first.tolist()
        if step:
            self._stop(int(step), loss, norm)

    def check_state(self, step: int, model: nn.Module, optimizer: Any) -> None:
        """:meth:`check`, and see that weights and optimiser state are finite after a step: they are to be kept.

        Raises:
            MasaError: they are not; the message names one that is not, the step and its batch.
        """
        self.check()
        names = {parameter: name for name, parameter in model.named_parameters()}
        tensors = {f"the weights {name} are": _part(parameter.detach()) for parameter, name in names.items()}
        for parameter, state in optimizer.state.items():
            for kind, value in state.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    tensors[f"the optimiser's {kind} of {names.get(parameter, 'a parameter')} is"] = _part(value)
        sound = [tensor.isfinite().all().to(self.device) for tensor in tensors.values()]
        if not torch.stack(sound).all():
            which = next(name for name, good in zip(tensors, sound, strict=True) if not good)
            raise MasaError(f"{self.run}: {which} not finite after step {step}, {self.batch(step)}. {MEND}")

    def check_scores(self, step: int, scores: Mapping[str, float]) -> None:
        """See that held-out scores are finite.

        Raises:
            MasaError: one is not.
        """
        for name, value in scores.items():
            if not math.isfinite(value):
                raise MasaError(f"{self.run}: {name} is {value} after step {step}. {MEND}")

    def _stop(self, step: int, loss: float, norm: float) -> None:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
        raise MasaError(f"{self.run}: {what} at step {step}, {self.batch(step)}. {MEND}")


def _part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that is cut into parts (FSDP)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Trainer(transformers.Trainer):
    """Hugging Face's Trainer, watched."""

    watch: Watch | None = None
    around: Sequence[Callable[[], AbstractContextManager]] = ()
    """Entered around every pass: what makes it fast where it runs."""
    inputs: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """What a batch becomes before it."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> Tensor:
        """Forward and backward pass of one micro-batch."""
        with ExitStack() as stack:
            for one in self.around:
                stack.enter_context(one())
            return super().training_step(model, self.inputs(inputs) if self.inputs else inputs, *args, **options)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A checkpoint is to be gone on from to the same bits: with the MLPs that a model's folder leaves out."""
        with as_trained(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)):
            super()._save(output_dir, state_dict)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm; called once a step, with the loss known and before the optimiser changes anything."""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.watch is not None:
            self.watch.look(self.state.global_step + 1, self._tr_loss, norm)
        return norm
