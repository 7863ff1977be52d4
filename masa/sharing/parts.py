"""Ways to store a matrix, or several with something in common: one class a kind, called to multiply or to write out.

A matrix W (out, in) of one layer is the sum of its parts. To add a kind, subclass :class:`Part` and decorate it with
:func:`part`; :mod:`masa.sharing.part_sources` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from masa.errors import MasaError, unknown
from masa.sharing.grouped import Grouped, held, stored
from masa.sharing.packed import Packed
from masa.sharing.products import at_most, autocast_dtype, on_device_of
from masa.sharing.weight_sources import call

Shape = tuple[int, int]
"""(out, in)."""

PARTS: dict[str, type[Part]] = {}


def part(kind: str) -> Callable[[type[Part]], type[Part]]:
    """Class decorator: make a :class:`Part` loadable under ``kind``."""

    def add(cls: type[Part]) -> type[Part]:
        cls.kind = kind
        PARTS[kind] = cls
        return cls

    return add


class Part(nn.Module):
    """What one or several matrices are stored as.

    Args:
        shapes: (out, in) of every member, in the order of the members.
        bits, group: of its numbers (:class:`~masa.sharing.grouped.Grouped`); None for numbers of the model's dtype.
    """

    kind: ClassVar[str]

    def __init__(self, shapes: Sequence[Shape], bits: int | None = None, group: int | None = None) -> None:
        super().__init__()
        self.shapes = [(int(out), int(inp)) for out, inp in shapes]
        self.bits, self.group = bits, group

    def config(self) -> dict[str, Any]:
        """JSON-able arguments beside the shapes that build this part again, empty."""
        few = {"bits": self.bits, "group": self.group}
        return {name: value for name, value in few.items() if value is not None}

    def written(self, row: int) -> Tensor:
        """The matrix (out, in) of one member."""
        raise NotImplementedError

    def multiplied(self, row: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b`` of one member."""
        return nn.functional.linear(on_device_of(weight := self.written(row), x), weight, bias)

    def own(self, row: int) -> list[Tensor]:
        """The tensors that only this member reads; what is left over belongs to all."""
        return list(self.state_dict().values())

    def reads(self, row: int) -> int:
        """Numbers that are read to multiply one token by this member."""
        out, inp = self.shapes[row]
        return out * inp

    def forward(self, row: int, x: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """``x W^T + b`` of one member, or the member's matrix without ``x``."""
        return self.written(row) if x is None else self.multiplied(row, x, bias)


def make_part(config: Mapping[str, Any], shapes: Sequence[Shape]) -> Part:
    """Build an empty part from its ``kind`` and :meth:`Part.config`.

    Raises:
        MasaError: an unknown kind, or arguments that it does not have.
    """
    arguments = dict(config)
    kind = arguments.pop("kind", None)
    if kind not in PARTS:
        raise unknown("Kind of part", kind, PARTS)
    try:
        return PARTS[kind](shapes, **arguments)
    except TypeError as error:
        raise MasaError(f"Part of kind {kind!r}: {error}.") from error


@part("dense")
class Dense(Part):
    """The matrix itself."""

    def __init__(self, shapes: Sequence[Shape], bits: int | None = None, group: int | None = None) -> None:
        super().__init__(shapes, bits, group)
        self.weight = stored(self.shapes[0], bits, group)

    def written(self, row: int) -> Tensor:
        weight = held(self.weight)
        return weight.to(autocast_dtype(weight))

    def multiplied(self, row: int, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = held(self.weight)
        return nn.functional.linear(on_device_of(weight, x), weight, bias)


@part("nothing")
class Nothing(Part):
    """A matrix of zeros, of which nothing is stored."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        super().__init__(shapes)
        self.like = nn.Parameter(torch.empty(0))  # of no element: it says dtype and device

    def written(self, row: int) -> Tensor:
        return self.like.new_zeros(self.shapes[row], dtype=autocast_dtype(self.like))

    def multiplied(self, row: int, x: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_zeros(*x.shape[:-1], self.shapes[row][0])
        return y if bias is None else y + bias

    def reads(self, row: int) -> int:
        return 0


@part("sparse")
class Sparse(Part):
    """The matrix with ``count`` values left where they were, packed; unpacked for each product."""

    def __init__(self, shapes: Sequence[Shape], count: int, bits: int | None = None, group: int | None = None) -> None:
        super().__init__(shapes, bits, group)
        self.count = int(count)
        self.packed = Packed(*self.shapes[0], self.count, bits, group)

    def config(self) -> dict[str, Any]:
        return {"count": self.count} | super().config()

    def written(self, row: int) -> Tensor:
        return call(self.packed)

    def reads(self, row: int) -> int:
        return self.count + super().reads(row)


class Product(Part):
    """Members that are a product through k numbers a token; subclasses say what the two factors are."""

    inner: int

    def into(self, row: int, x: Tensor) -> Tensor:
        """(..., in) -> (..., k)."""
        raise NotImplementedError

    def out_of(self, row: int, y: Tensor, bias: Tensor | None) -> Tensor:
        """(..., k) -> (..., out)."""
        raise NotImplementedError

    def multiplied(self, row: int, x: Tensor, bias: Tensor | None) -> Tensor:
        out, inp = self.shapes[row]
        extra = self.inner * (out + inp) - out * inp  # a token's products beyond those of the matrix written out
        if extra > 0 and not at_most(x, self.inner * out * inp // extra):
            return super().multiplied(row, x, bias)
        return self.out_of(row, self.into(row, x), bias)

    def reads(self, row: int) -> int:
        out, inp = self.shapes[row]
        return self.inner * (out + inp)


@part("low-rank")
class LowRankPart(Product):
    """``W = B A`` with A^T (in, r) and B^T (r, out) in memory, as one token is multiplied by them.

    Several members have A in common, and a B each: B^T is then (n, r, out).
    """

    def __init__(self, shapes: Sequence[Shape], rank: int, bits: int | None = None, group: int | None = None) -> None:
        super().__init__(shapes, bits, group)
        self.inner = int(rank)
        if len(set(self.shapes)) != 1:
            raise MasaError(f"Factors in common need members of one shape, got {self.shapes}.")
        out, inp = self.shapes[0]
        self.right = stored((inp, self.inner), bits, group)
        several = [len(self.shapes)] if len(self.shapes) > 1 else []
        self.left = stored((*several, self.inner, out), bits, group)

    def config(self) -> dict[str, Any]:
        return {"rank": self.inner} | super().config()

    def own(self, row: int) -> list[Tensor]:
        if len(self.shapes) == 1:
            return super().own(row)
        if isinstance(self.left, Grouped):  # numbers and scales of all, of which each has an equal share
            return [t[: len(t) // len(self.shapes)] for t in self.left.state_dict().values()]
        return [self.left[row]]

    def of(self, row: int) -> Tensor:
        """B^T (r, out) of one member."""
        left = held(self.left)
        return left if left.ndim == 2 else left.select(0, row)

    def written(self, row: int) -> Tensor:
        return (held(self.right) @ self.of(row)).t()

    def into(self, row: int, x: Tensor) -> Tensor:
        right = held(self.right)
        return torch.matmul(on_device_of(right, x), right)

    def out_of(self, row: int, y: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(y, self.of(row).t(), bias)


@part("mixture")
class MixturePart(Part):
    """``W_l = sum_s C[l, s] D[s]`` (arXiv 2508.04581, Eq. 2) for n members, with atoms of few bits.

    One atom at a time is written out. Atoms as they are belong to the sources that train them.

    Args:
        atoms: S.
    """

    def __init__(self, shapes: Sequence[Shape], atoms: int, bits: int, group: int | None = None) -> None:
        super().__init__(shapes, bits, group)
        if len(set(self.shapes)) != 1:
            raise MasaError(f"A mixture needs members of one shape, got {self.shapes}.")
        self.atoms = nn.ModuleList(Grouped(self.shapes[0], bits, group) for _ in range(int(atoms)))
        self.coefficients = nn.Parameter(torch.empty(len(self.shapes), int(atoms)))

    def config(self) -> dict[str, Any]:
        return {"atoms": len(self.atoms)} | super().config()

    def own(self, row: int) -> list[Tensor]:
        return [self.coefficients[row]]

    def written(self, row: int) -> Tensor:
        total, c = None, self.coefficients.select(0, row)
        exact = torch.promote_types(c.dtype, torch.float32)
        for index, atom in enumerate(self.atoms._modules.values()):
            term = call(atom).to(exact) * c.select(0, index).to(exact)
            total = term if total is None else total + term
        return total.to(autocast_dtype(c))

    def reads(self, row: int) -> int:
        return len(self.atoms) * super().reads(row)


@part("sparse-dictionary")
class SparseDictionary(Product):
    """A dictionary of k atoms, dense, and packed coefficients for every member.

    Args:
        atoms: k.
        counts: coefficients that stay, of every member.
        side: "in": atoms are of the inputs, ``W^T = D C`` with D (in, k) for all members. "out": of the outputs,
            ``W = D C`` with D (out, k).
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        atoms: int,
        counts: Sequence[int],
        side: str = "in",
        bits: int | None = None,
        group: int | None = None,
    ) -> None:
        super().__init__(shapes, bits, group)
        if side not in ("in", "out"):
            raise unknown("The side of a dictionary", side, ("in", "out"))
        self.inner, self.side, self.counts = int(atoms), side, [int(n) for n in counts]
        if len(self.counts) != len(self.shapes) or len({shape[side == "in"] for shape in self.shapes}) != 1:
            raise MasaError(f"A dictionary of the {side} side needs members of one width, got {self.shapes}.")
        self.atoms = stored((self.shapes[0][side == "in"], self.inner), bits, group)
        self.codes = nn.ModuleList(
            Packed(*((out, self.inner) if side == "in" else (self.inner, inp)), count, bits, group)
            for (out, inp), count in zip(self.shapes, self.counts, strict=True)
        )

    def config(self) -> dict[str, Any]:
        return {"atoms": self.inner, "counts": self.counts, "side": self.side} | super().config()

    def own(self, row: int) -> list[Tensor]:
        return list(self.codes[row].state_dict().values())

    def code(self, row: int) -> Tensor:
        """C^T (out, k) of the input side, C (k, in) of the output side."""
        return call(self.codes._modules[str(row)])

    def written(self, row: int) -> Tensor:
        return self.code(row) @ held(self.atoms).t() if self.side == "in" else held(self.atoms) @ self.code(row)

    def into(self, row: int, x: Tensor) -> Tensor:
        factor = held(self.atoms) if self.side == "in" else self.code(row).t()
        return torch.matmul(on_device_of(factor, x), factor)

    def out_of(self, row: int, y: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(y, self.code(row) if self.side == "in" else held(self.atoms), bias)

    def reads(self, row: int) -> int:
        return self.counts[row] + super().reads(row)
