"""The weight source of matrices that are each stored in a way of its own, alone or together with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from masa.errors import MasaError
from masa.sharing.parts import Part, make_part
from masa.sharing.spec import ModelShape
from masa.sharing.weight_sources import Weights, WeightSource, call, register, wrapped


@register("parts")
class Parts(WeightSource):
    """``W_l`` is the sum of its parts: dense, sparse, low rank, or codes of a dictionary that other matrices read, too.

    Args:
        projections: letters served; more than one only where matrices of different projections have a part in common.
        shapes: letter -> (out, in).
        parts: each ``{"kind": ..., "of": [[letter, layer], ...]}`` with the arguments of its kind
            (:data:`masa.sharing.parts.PARTS`); layers are counted among those that have the projection.
    """

    def __init__(
        self,
        projections: str,
        num_layers: int,
        shapes: Mapping[str, Sequence[int]],
        parts: Sequence[Mapping[str, Any]],
    ) -> None:
        self.shapes = {letter: (int(shapes[letter][0]), int(shapes[letter][1])) for letter in projections}
        super().__init__(projections, num_layers, self.shapes[projections[0]])
        self.members = [[(str(letter), int(layer)) for letter, layer in part["of"]] for part in parts]
        self.parts = nn.ModuleList(
            make_part({k: v for k, v in part.items() if k != "of"}, [self.shapes[letter] for letter, _ in members])
            for part, members in zip(parts, self.members, strict=True)
        )
        self._of: dict[tuple[str, int], list[tuple[str, int]]] = {
            (letter, layer): [] for letter in projections for layer in range(num_layers)
        }
        for index, members in enumerate(self.members):
            for row, key in enumerate(members):
                self._of[key].append((str(index), row))
        if absent := [key for key, found in self._of.items() if not found]:
            raise MasaError(f"No part makes the matrix {absent[0][0]} of layer {absent[0][1]}.")

    def config(self) -> dict[str, Any]:
        return {
            "projections": self.projections,
            "num_layers": self.num_layers,
            "shapes": {letter: list(shape) for letter, shape in self.shapes.items()},
            "parts": [
                {"kind": part.kind, "of": [list(key) for key in members], **part.config()}
                for part, members in zip(self.parts, self.members, strict=True)
            ],
        }

    def parts_of(self, projection: str, layer: int) -> list[tuple[Part, int]]:
        """What W_l is the sum of, and which member of each it is."""
        found = [(self.parts._modules[index], row) for index, row in self._of[projection, layer]]
        for part, _ in found:
            if not isinstance(part, Part):
                raise wrapped(part, self.projections)
        return found

    def layer_weight(self, projection: str, layer: int) -> Tensor:
        terms = [call(part, row) for part, row in self.parts_of(projection, layer)]
        return sum(terms[1:], terms[0])

    def weights(self) -> Weights:
        return {
            letter: tuple(self.layer_weight(letter, layer) for layer in range(self.num_layers))
            for letter in self.projections
        }

    def product(self, projection: str, layer: int, x: Tensor, bias: Tensor | None) -> Tensor:
        (first, row), *others = self.parts_of(projection, layer)
        y = call(first, row, x, bias)
        for part, row in others:
            y = y + call(part, row, x)
        return y

    def stored_numbers(self) -> int:
        """The same as numbers of the weights' own width, rounded up."""
        return -(-self.stored_bytes() // next(self.parameters()).element_size())

    def stored_numbers_of(self, letters: str) -> int:
        """What members of these projections store, and their share of what they have in common with others."""
        total, width = 0.0, next(self.parameters()).element_size()
        for part, members in zip(self.parts, self.members, strict=True):
            own = [sum(t.numel() * t.element_size() for t in part.own(row)) for row in range(len(members))]
            whole = sum(t.numel() * t.element_size() for t in part.state_dict().values())
            common = (whole - sum(own)) / len(members)
            total += sum(size + common for size, (letter, _) in zip(own, members, strict=True) if letter in letters)
        return -(-round(total) // width)

    def dense_numbers(self) -> int:
        return self.num_layers * sum(out * inp for out, inp in self.shapes.values())

    def read_numbers(self) -> int:
        return sum(part.reads(row) for part, m in zip(self.parts, self.members, strict=True) for row in range(len(m)))


def guard_bytes(shape: ModelShape, letters: str, dtype: torch.dtype) -> int:
    """Bytes that a folder spends on telling loaders that these matrices are not stored: a number each."""
    return sum(map(shape.count, letters)) * dtype.itemsize
