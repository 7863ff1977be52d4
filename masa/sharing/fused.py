"""Layers that hold several projections: read by their parts, taken apart, and put together again.

Families lay the parts out in two ways, both of which :class:`Layout` says: one after the other (``[Q; K; V]``), or for
every group of heads in turn (``[Q_1; K_1; V_1; Q_2; …]``, GPT-NeoX' and BLOOM's heads, Falcon's key/value heads).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from masa.sharing.linears import ComputedWeight, SharedWeight, is_conv1d, like, sizes


@dataclass(frozen=True)
class Layout:
    """Which rows of a fused layer belong to which projection.

    Attributes:
        letters: of the projections, in the order of their rows.
        rows: of each of them in one group.
        groups: how often that repeats.
    """

    letters: str
    rows: tuple[int, ...]
    groups: int = 1

    def size(self, letter: str) -> int:
        """Rows of one projection."""
        return self.groups * self.rows[self.letters.index(letter)]

    def take(self, weight: Tensor, letter: str) -> Tensor:
        """The rows of one projection, (out, in), of all of them; a view where they lie together."""
        return self.rows_of(weight, letter).flatten(0, 1)

    def rows_of(self, weight: Tensor, letter: str) -> Tensor:
        """The rows of one projection, by group: (groups, rows, in), a view."""
        index = self.letters.index(letter)
        grouped = weight.unflatten(0, (self.groups, sum(self.rows)))
        return grouped.narrow(1, sum(self.rows[:index]), self.rows[index])

    def put(self, parts: list[Tensor], dim: int) -> Tensor:
        """The parts, in the order of the letters, joined along their dimension of rows (0 or -1)."""
        if self.groups == 1:
            return torch.cat(parts, dim)
        split = [part.unflatten(dim, (self.groups, -1)) for part in parts]
        return torch.cat(split, 1 if dim == 0 else -1).flatten(*((0, 1) if dim == 0 else (-2, -1)))

    @property
    def stacked(self) -> bool:
        """Whether the projections stand one below the other, all of one size, as in timm."""
        return self.groups == 1 and len(set(self.rows)) == 1


@dataclass(frozen=True)
class Rows:
    """One projection of a layer that is no ``nn.Linear`` of its own: rows of a fused one, or a transposed one."""

    layer: nn.Module
    letter: str
    layout: Layout
    bias: None = None

    @property
    def in_features(self) -> int:
        return sizes(self.layer)[1]

    @property
    def out_features(self) -> int:
        return self.layout.size(self.letter)

    @property
    def weight(self) -> Tensor:
        """(out, in), a view where its rows lie together."""
        return self.layout.take(self._whole, self.letter)

    def write(self, weight: Tensor) -> None:
        """Write a weight (out, in) into the layer's own."""
        rows = self.layout.rows_of(self._whole, self.letter)
        rows.copy_(weight.view(rows.shape))

    @property
    def _whole(self) -> Tensor:
        """(out, in) of all projections."""
        weight = self.layer.weight
        return weight.t() if is_conv1d(self.layer) else weight


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

    The parts are children named by their letters; the bias of all of them stays here, in the layer's own order. In
    training the weights are put together before one GEMM, so the model's own attention reads the same tensor as before;
    else each part multiplies by itself, and nothing dense is made.

    Args:
        fused: the layer to split, an ``nn.Linear`` or a ``Conv1D``; its values are copied.
        layout: whose rows are whose.
    """

    def __init__(self, fused: nn.Module, layout: Layout) -> None:
        nn.Module.__init__(self)
        self.layout, self.replaced = layout, type(fused)
        self.out_features, self.in_features = sizes(fused)
        for letter in layout.letters:
            self.add_module(letter, Part(Rows(fused, letter, layout).weight.detach().clone()))
        self.register_parameter("bias", fused.bias)
        self._is_hf_initialized = True  # transformers draws no new weight into it

    def computed(self) -> Tensor:
        """(out, in) of all parts, in the layer's order."""
        return self.layout.put([part.computed() for part in self.parts()], 0)

    def parts(self) -> list[SharedWeight | Part]:
        """In the order of the rows."""
        return [getattr(self, letter) for letter in self.layout.letters]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return nn.functional.linear(x, self.computed(), self.bias)
        y = self.layout.put([part(x) for part in self.parts()], -1)
        return y if self.bias is None else y + self.bias

    def join(self) -> nn.Module:
        """One ordinary layer of the kind that was split, with the same weights."""
        return like(self.replaced, self.computed().detach(), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, projections={self.layout.letters}"
