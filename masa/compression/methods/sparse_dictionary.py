"""A dictionary for each matrix, with sparse coefficients: ROCKET (arXiv 2602.11008), and ours for the loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partialmethod
from typing import Any

from torch import Tensor

from masa.compression.allocation.bytes import Option
from masa.compression.base import register
from masa.compression.methods.dictionaries import Code, Side
from masa.compression.methods.equal_bytes import ByteCompressor, Family
from masa.compression.methods.fits import Fit, dictionary_fit, part_bytes
from masa.compression.methods.matrices import Matrix
from masa.errors import MasaError, unknown

SIDES = ("in", "out", "short", "both")
SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.35)
RATIOS = [1.5, 2.0, 2.5]  # a list, as it comes back from a configuration


class Dictionary(Family):
    """k atoms, and s coefficients a column on average.

    Args:
        side: of the atoms: "in", "out", the "short" side, or "both" to choose from.
        outputs: how the loss enters the fit: "none", "diagonal" or "full".
        scope, weight_space: see :meth:`~masa.compression.methods.dictionaries.Basis.code`.
        ratios: k / s to choose from.
        rounds: of pursuit, for what was chosen.
        log: of jitters.
    """

    name, factors = "sparse-dictionary", 2

    def __init__(
        self,
        side: str,
        outputs: str,
        scope: str,
        weight_space: float,
        ratios: Sequence[float],
        rounds: int,
        log: dict[str, float],
    ) -> None:
        if side not in SIDES:
            raise unknown("side", side, SIDES)
        if not ratios or min(ratios) < 1:
            raise MasaError(f"ratios are numbers of atoms over coefficients a column, at least 1, got {ratios}.")
        self.side, self.outputs, self.scope, self.weight_space = side, outputs, scope, weight_space
        self.ratios, self.rounds, self.log = ratios, rounds, log

    def sides(self, matrix: Matrix) -> list[str]:
        """The sides to choose from."""
        out, inp = matrix.weight.shape
        if self.side == "short":
            return ["in" if inp <= out else "out"]
        return ["in", "out"] if self.side == "both" else [self.side]

    def options(self, matrix: Matrix, rule: str, shares: Sequence[float] | None, width: int) -> list[Option]:
        found: list[Option] = []
        for name in self.sides(matrix):
            side = Side.of(matrix, name, self.outputs, self.log)
            basis = side.basis()
            for share in SHARES if shares is None else shares:
                for ratio in self.ratios:
                    shape = (matrix.weight.shape[0], matrix.weight.shape[1])
                    directions, capped = basis.codes.shape[0], shares is not None
                    sizes = dictionary_sizes([shape], name, share, ratio, width, directions, capped)
                    if sizes is None:
                        continue
                    atoms, count, size = sizes
                    kept, mask = basis.kept(atoms, count, self.scope, self.weight_space)
                    settings = {"side": name, "atoms": atoms, "count": count}
                    if (scale := self._scale(matrix, rule)) is not None:
                        cost = basis.error(kept) * scale
                    else:
                        cost = matrix.cost(rule, written(side.refit(kept, mask), name))
                    found.append(Option((matrix.member,), self.name, size, cost, settings))
        return found

    def _scale(self, matrix: Matrix, rule: str) -> float | None:
        """What the error of a fit is to be multiplied by to be the cost; None where that is in another metric."""
        if rule == "whitened" and self.outputs == "none":
            return 0.0 if matrix.idle else 1 / max(matrix.energy(), 1e-300)
        if (rule, self.outputs) in (("loss", "full"), ("loss-diagonal", "diagonal")):
            return 0.5
        return None

    def fit(self, matrix: Matrix, option: Option) -> list[Fit]:
        name = str(option.settings["side"])
        side = Side.of(matrix, name, self.outputs, self.log)
        atoms, count = int(option.settings["atoms"]), int(option.settings["count"])
        code = side.improve(side.basis().code(atoms, count, self.scope, self.weight_space), self.rounds)
        return [dictionary_fit([matrix.member], code.atoms, [code.codes], [code.mask], name)]

    def configs(self, option: Option) -> list[dict[str, Any]]:
        atoms, count, side = (option.settings[name] for name in ("atoms", "count", "side"))
        return [{"kind": "sparse-dictionary", "atoms": atoms, "counts": [count], "side": side}]


def written(code: Code, side: str) -> Tensor:
    """The matrix (out, in) of a code."""
    product = code.atoms @ code.codes
    return product.T if side == "in" else product


def dictionary_sizes(
    shapes: Sequence[tuple[int, int]], side: str, share: float, ratio: float, width: int, directions: int, capped: bool
) -> tuple[int, int, int] | None:
    """k, the coefficients of all members and the bytes of a dictionary with k / s = ``ratio`` within a share of theirs.

    Args:
        shapes: (out, in) of the members; one, unless the dictionary is shared.
        directions: that the members have; there are no more atoms.
        capped: where the ratio asks for more atoms than that, there are more coefficients in their place; else there
            is no such dictionary, which is for those who have other ratios and shares to choose from.

    Returns:
        None where no atom or coefficient fits, or where there are too many.
    """
    out, inp = sum(out for out, _ in shapes), shapes[0][1]
    m, n = (inp, out) if side == "in" else (out, inp)
    budget = share * m * n * width
    atoms = int(budget / (m * width + n / 8 + n * width / ratio))
    if atoms < 1 or (not capped and atoms > min(m, n)):
        return None
    atoms = min(atoms, directions)
    config = {"kind": "sparse-dictionary", "atoms": atoms, "counts": [0] * len(shapes), "side": side}
    bare = part_bytes(config, shapes, width)
    count = min(int((budget - bare) // width), atoms * n)
    return (atoms, count, bare + count * width) if count >= 1 else None


@register("sparse-dictionary")
class SparseDictionaryCompressor(ByteCompressor):
    """ROCKET: dictionaries in closed form, allocated by the weights' relative error (arXiv 2602.11008).

    Ours beside it: pursuit with exact dictionaries (``rounds``, GeoPair's steps), atoms of the outputs, and every bit
    counted.

    Args:
        cost, allocation, bits: of :class:`~masa.compression.methods.equal_bytes.ByteCompressor`.
        side, outputs, scope, weight_space, ratios, rounds: of :class:`Dictionary`.
    """

    def __init__(
        self,
        cost: str = "weights",
        allocation: str = "global",
        side: str = "in",
        outputs: str = "none",
        scope: str = "columns",
        weight_space: float = 0.5,
        ratios: Sequence[float] = RATIOS,
        rounds: int = 0,
        bits: Sequence[int] | None = None,
    ) -> None:
        super().__init__(cost, allocation, bits)
        self.side, self.outputs, self.scope, self.weight_space = side, outputs, scope, weight_space
        self.ratios, self.rounds = ratios, rounds

    def needs_loss(self) -> bool:
        return self.cost.startswith("loss") or self.outputs != "none"

    def families(self, log: dict[str, float]) -> list[Family]:
        return [
            Dictionary(self.side, self.outputs, self.scope, self.weight_space, self.ratios, self.rounds, log),
        ]


@register("sparse-dictionary-fisher")
class SparseDictionaryFisher(SparseDictionaryCompressor):
    """Sparse dictionaries fitted and allocated in the metric of the loss (ours). Needs a calibration with gradients.

    Args:
        cost, allocation, bits: of :class:`~masa.compression.methods.equal_bytes.ByteCompressor`.
        side, outputs, scope, weight_space, ratios, rounds: of :class:`Dictionary`.
    """

    __init__ = partialmethod(
        SparseDictionaryCompressor.__init__,
        cost="loss-diagonal",
        side="short",
        outputs="diagonal",
        scope="matrix",
        weight_space=0.0,
        rounds=4,
    )
