"""The linear layers of a model that shares: what reads a shared weight, and fused layers taken apart.

They are ``nn.Linear`` to whoever asks, with a ``weight`` that can be read and not written: it is computed from what all
layers share, and a value written to it would be lost, or would change every other layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
        return (made.clone() if made._is_view() or isinstance(made, nn.Parameter) else made).as_subclass(ReadOnlyWeight)

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
        like: the linear layer that this one replaces; its bias stays.
    """

    def __init__(self, shared: SharedProjections, projection: str, layer: int, like: nn.Module | Rows) -> None:
        nn.Module.__init__(self)
        object.__setattr__(self, "_shared", shared)
        self.projection, self.layer = projection, layer
        self.in_features, self.out_features = like.in_features, like.out_features
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


@dataclass(frozen=True)
class Rows:
    """One projection inside a fused linear layer: the ``index``-th of ``count`` equal blocks of its rows."""

    fused: nn.Linear
    index: int
    count: int
    bias: None = None

    @property
    def in_features(self) -> int:
        return self.fused.in_features

    @property
    def out_features(self) -> int:
        return self.fused.out_features // self.count

    @property
    def weight(self) -> Tensor:
        """(out, in), a view."""
        return self.fused.weight.view(self.count, self.out_features, self.in_features)[self.index]


class Part(nn.Module):
    """The weight of one projection inside a fused layer that does not share it: a child, no layer of its own."""

    bias = None

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous())
        self.out_features, self.in_features = weight.shape

    def computed(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class FusedLinear(ComputedWeight, nn.Linear):
    """A fused linear layer whose projections can be replaced one by one: ``y = x [W_q; W_k; W_v]^T + b``.

    The parts are children named by their letters; the bias of all of them stays here. In training the weights are put
    together before one GEMM, so the model's own attention reads the same tensor as before; else each part multiplies
    by itself, and nothing dense is made.

    Args:
        fused: the layer to split; its values are copied.
        letters: its projections, in the order of its rows.
    """

    def __init__(self, fused: nn.Linear, letters: str) -> None:
        nn.Module.__init__(self)
        self.letters = letters
        self.in_features, self.out_features = fused.in_features, fused.out_features
        for index, letter in enumerate(letters):
            self.add_module(letter, Part(Rows(fused, index, len(letters)).weight.detach().clone()))
        self.register_parameter("bias", fused.bias)
        self._is_hf_initialized = True  # transformers draws no new weight into it

    def computed(self) -> Tensor:
        """(out, in) of all parts, one below the other."""
        return torch.cat([part.computed() for part in self.parts()])

    def parts(self) -> list[SharedWeight | Part]:
        """In the order of the rows."""
        return [getattr(self, letter) for letter in self.letters]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return nn.functional.linear(x, self.computed(), self.bias)
        y = torch.cat([part(x) for part in self.parts()], dim=-1)
        return y if self.bias is None else y + self.bias

    def join(self) -> nn.Linear:
        """One ordinary linear layer with the same weights."""
        return linear(self.computed().detach(), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, projections={self.letters}"


def computed_layers(model: nn.Module) -> list[str]:
    """Names of the layers whose dense weight is not stored; ``NAME.weight`` is what a plain model has there."""
    return [name for name, module in model.named_modules() if isinstance(module, SharedLinear | FusedLinear)]


def linear(weight: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """A linear layer of these very parameters, on their device and of their dtype."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.contiguous())
    layer.bias = bias
    return layer
