"""What healing trains: float32 copies of the sources' numbers, which the sources show as they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from masa.sharing.grouped import Grouped
from masa.sharing.projections import SharedProjections


def adapters_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of adapters (PEFT) that a model wears and that are to be trained; none where it wears none."""
    return [p for p in model.parameters() if p.requires_grad] if getattr(model, "peft_config", None) else []


class Trained:
    """Parameters, their float32 masters, and AdamW on these.

    Args:
        parameters: that have gradients.
        few: numbers with few bits, whose scales are among the parameters.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], few: Sequence[Grouped]) -> None:
        self.parameters, self.few = list(parameters), list(few)
        self.count = sum(p.numel() for p in parameters)
        self.read()

    def read(self) -> None:
        """Begin with the numbers that the parameters have now."""
        self.masters = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self.parameters]
        sizes = [float(m.square().mean().sqrt()) for m in self.masters]
        some = [size for size in sizes if size > 0]
        usual = sum(some) / len(some) if some else 1.0  # of a tensor of zeros, as half of a fresh adapter is
        groups = [{"params": [m], "size": size or usual} for m, size in zip(self.masters, sizes, strict=True)]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)

    def forget(self) -> None:
        """No gradient is left."""
        for p in self.parameters:
            p.grad = None

    def step(self, lr: float) -> None:
        """One step of the masters with the parameters' gradients; the parameters get the masters' values, rounded.

        Args:
            lr: as a fraction of each tensor's root mean square when training began.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = lr * group["size"]
        for p, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if p.grad is None else p.grad.to(master.dtype)
        self.forget()
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimiser.step()
        self.show()

    @torch.no_grad()
    def show(self) -> None:
        """The parameters get the masters' values, as they are stored."""
        for p, master in zip(self.parameters, self.masters, strict=True):
            p.copy_(master)
        for numbers in self.few:
            numbers.settle()


@contextmanager
def training_only(model: nn.Module, shared: SharedProjections) -> Iterator[Trained]:
    """The sources' parameters, or the adapters' where there are any, which alone have gradients meanwhile.

    After an error they are what they were.
    """
    adapters = adapters_of(model)
    few = [] if adapters else [m for m in shared.modules() if isinstance(m, Grouped)]
    for numbers in few:
        numbers.thaw()
    sources = adapters or [p for p in shared.parameters() if p.numel()]
    before = [p.detach().clone() for p in sources]
    others = list({id(p): p for p in model.parameters()}.values())
    flags, training = [p.requires_grad for p in others], model.training
    for p in others:
        p.requires_grad_(False)
    for p, values in zip(sources, before, strict=True):
        p.data = values.clone()  # a memory-mapped file is not written to
        p.requires_grad_(True)
    model.eval()
    try:
        yield Trained(sources, few)
    except BaseException:
        for p, values in zip(sources, before, strict=True):
            p.data = values
        raise
    finally:
        for p, flag in zip(others, flags, strict=True):
            p.requires_grad_(flag)
            p.grad = None
        for numbers in few:
            numbers.freeze()
        model.train(training)
