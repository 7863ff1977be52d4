"""The linear layers of a model that shares: what reads a shared weight, and what stands there without sharing.

They are ``nn.Linear`` to whoever asks, with a ``weight`` that can be read and not written: it is computed from what all
layers share, and a value written to it would be lost, or would change every other layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from masa.errors import MasaError
from masa.sharing.bank import SharedProjections

_MEND = "Write every matrix out first, plain = masa.fold(model), and do it there."


class ReadOnlyWeight(Tensor):
    """A weight as it was computed for this read; any function that would write to it says why that is of no use."""

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        target = args[0] if args else (kwargs or {}).get("tensor")  # as torch.nn.init names it
        name, written = getattr(func, "__name__", ""), isinstance(target, cls)
        if written and (name == "requires_grad_" or func == torch.Tensor.requires_grad.__set__):
            return target  # whether it is trained is said by what it is computed from
        if written and (name in _WRITING or (name.endswith("_") and not name.endswith("__"))):
            raise MasaError(
                "This weight is computed from what all layers share: it can be read, but writing to it would be lost. "
                + _MEND
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        # .data and .detach() are the same memory
        if name in ("__get__", "detach") and type(result) is Tensor and written:
            return result.as_subclass(cls)
        return result


_WRITING = {"__set__", "__setitem__", "set_", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__imatmul__"}


class ComputedWeight(nn.Module):
    """A layer whose ``weight`` is what :meth:`computed` makes: read by anybody, written by nobody."""

    def computed(self) -> Tensor:
        """(out, in) for a product, perhaps a view of what all layers share."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """(out, in), computed for this read; read-only (:class:`ReadOnlyWeight`)."""
        made = self.computed()
        # some kinds hand out what they store
        made = (made.clone() if made._is_view() or isinstance(made, nn.Parameter) else made).as_subclass(ReadOnlyWeight)
        made._is_hf_initialized = True  # transformers draws nothing into it on behalf of the module around
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise MasaError(
                f"The weight of {type(self).__name__} is computed from what all layers share and cannot be replaced in "
                f"one layer. {_MEND}"
            )
        if name == "qconfig":  # with which torch.ao.quantization marks layers that it converts
            raise MasaError(
                f"{type(self).__name__} has no weight of its own that could be quantised: it would stay as it is. "
                f"{_MEND}"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        guard = state_dict.get(f"{prefix}weight")
        if guard is not None and tuple(guard.shape) == (1,):  # what a saved model has in the matrix's place
            del state_dict[f"{prefix}weight"]
        super()._load_from_state_dict(state_dict, prefix, *args)


class SharedWeight(ComputedWeight):
    """One projection of one layer: W from the model's :class:`~masa.sharing.bank.SharedProjections`, its bias its own.

    Args:
        shared: the bank, referenced and not registered, so that every parameter appears once.
        projection, layer: which weight to read.
            Layers are counted among the blocks that share this projection.
        like: the layer that this one replaces, an ``nn.Linear`` or a ``Conv1D``; its bias stays.
    """

    def __init__(self, shared: SharedProjections, projection: str, layer: int, like: nn.Module) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "_shared", shared)
        self.projection, self.layer, self.replaced = projection, layer, type(like)
        self.out_features, self.in_features = sizes(like)
        self.register_parameter("bias", like.bias)
        self._is_hf_initialized = True  # transformers draws no new weight into it

    def computed(self) -> Tensor:
        return self._shared.weight(self.projection, self.layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._shared.product(self.projection, self.layer, x, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, projection={self.projection}, layer={self.layer}"


class SharedLinear(SharedWeight, nn.Linear):
    """``y = x W^T + b`` with a shared W, in the place of an ``nn.Linear``."""


def computed_layers(model: nn.Module) -> list[str]:
    """Names of the layers whose dense weight is not stored; ``NAME.weight`` is what a plain model has there."""
    return [n for n, m in model.named_modules() if isinstance(m, ComputedWeight) and isinstance(m, nn.Linear)]


LIKE_LINEAR = {"FalconLinear"}
"""Subclasses of ``nn.Linear`` that compute the same in other words."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D`` of GPT-2: ``y = x W + b`` with W (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_plain(module: nn.Module | None) -> bool:
    """Whether it is a linear layer with a weight of its own: ``nn.Linear``, or GPT-2's ``Conv1D``."""
    if isinstance(module, nn.Linear):
        kind = type(module)
        same = kind.forward is nn.Linear.forward or kind.__name__ in LIKE_LINEAR
        return same and not isinstance(module, ComputedWeight)
    return module is not None and is_conv1d(module)


def sizes(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer of either kind."""
    if is_conv1d(layer):
        inp, out = layer.weight.shape
        return out, inp
    return layer.out_features, layer.in_features


def linear(weight: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """A linear layer of these very parameters, on their device and of their dtype."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.contiguous())
    layer.bias = bias
    return layer


def like(kind: type[nn.Module], weight: Tensor, bias: nn.Parameter | None = None) -> nn.Module:
    """As :func:`linear`, of the kind that a family has there.

    Args:
        kind: ``nn.Linear``, a subclass of it without a state of its own, or ``Conv1D``.
        weight: (out, in).
    """
    if issubclass(kind, nn.Linear):
        layer: nn.Module = linear(weight, bias)
        layer.__class__ = kind
        return layer
    with torch.device("meta"):
        layer = kind(*weight.shape)
    layer.weight, layer.bias = nn.Parameter(weight.t().contiguous()), bias
    return layer
