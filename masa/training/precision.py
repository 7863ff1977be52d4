"""Float32 masters, bfloat16 arithmetic: every weight is cast once a pass, and nothing that is traced knows of it.

Autocast casts inside every layer and keeps what is between the layers in float32. Here the model's parameters are
exchanged for bfloat16 copies before a pass and given back after it, so activations are bfloat16 from the embeddings to
the logits. Gradients arrive at the float32 parameters through one function that casts them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from masa.errors import MasaError
from masa.sharing.bank import SharedProjections
from masa.training.compiling import is_compiled


def uses_bfloat16(recipe: Mapping[str, Any]) -> bool:
    """Whether the linear layers run in bfloat16: on request, or by "auto" on a GPU that is made for it."""
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return recipe["dtype"] == "bfloat16" or (recipe["dtype"] == "auto" and fast)


def compiles(recipe: Mapping[str, Any]) -> bool:
    """Whether the model is compiled (:func:`masa.training.compiling.is_compiled`), on this machine.

    Raises:
        MasaError: asked for together with FSDP, which takes the compiled layers apart.
    """
    if recipe.get("compile") is True and recipe.get("parallel", "ddp") == "fsdp":
        raise MasaError("training.compile: true needs training.parallel: ddp.")
    return is_compiled(recipe, torch.cuda.is_available())


class _Cast(torch.autograd.Function):
    """Many tensors to one dtype in a few kernels, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return _copied(tensors, [dtype] * len(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [i for i, gradient in enumerate(gradients) if gradient is not None]
        found: list[Tensor | None] = [None] * len(gradients)
        copies = _copied([gradients[i] for i in given], [ctx.dtypes[i] for i in given])
        for i, gradient in zip(given, copies, strict=True):
            found[i] = gradient
        return None, *found


def _copied(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> tuple[Tensor, ...]:
    made = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    if made:
        torch._foreach_copy_(made, list(tensors))
    return tuple(made)


class CastOnce:
    """The model's float32 parameters as bfloat16 for the length of one pass, forward and backward.

    What layers share is mixed in float32 and cast once as the layers' weights; atoms and coefficients stay as they are.

    Args:
        model: whose parameters are float32; while :meth:`__call__` is open they are not to be asked for.
        dtype: of the arithmetic.
        together: cast all in a few kernels, which gives all gradients at the end of the backward pass; else one by one,
            so that several processes exchange the first while the next are computed.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.bfloat16, together: bool = True) -> None:
        self.dtype, self.together = dtype, together
        self.banks = [module for module in model.modules() if isinstance(module, SharedProjections)]
        shared = {id(parameter) for bank in self.banks for parameter in bank.parameters()}
        self.slots: dict[nn.Parameter, list[tuple[dict, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dtype == torch.float32 and id(parameter) not in shared:
                    self.slots.setdefault(parameter, []).append((module._parameters, name))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Weights in the other dtype; where gradients are off, so are theirs."""
        masters = list(self.slots)
        made = [bank.make() for bank in self.banks]
        rows = {id(row): row for weights in made for layers in weights.values() for row in layers}
        cast = self._cast([*masters, *rows.values()])
        lower = dict(zip(rows, cast[len(masters) :], strict=True))
        try:
            for bank, weights in zip(self.banks, made, strict=True):
                bank.hold({p: tuple(lower[id(row)] for row in layers) for p, layers in weights.items()})
            self._put(dict(zip(masters, cast, strict=False)))
            yield
        finally:
            self._put({master: master for master in masters})
            for bank in self.banks:
                bank.hold(None)

    def _cast(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        if self.together and tensors:
            return _Cast.apply(self.dtype, *tensors)
        return [tensor.to(self.dtype) for tensor in tensors]

    def _put(self, values: dict[nn.Parameter, Tensor]) -> None:
        for master, value in values.items():
            for parameters, name in self.slots[master]:
                parameters[name] = value

    def inputs(self, given: dict[str, Any]) -> dict[str, Any]:
        """A batch in the same arithmetic: pixels, but no labels, which are whole numbers or probabilities."""
        return {
            name: value.to(self.dtype) if name == "pixel_values" and isinstance(value, Tensor) else value
            for name, value in given.items()
        }
