"""The frame of all methods whose budget is in bytes: options of every matrix, one allocation, then the fits.

A method is a list of families of options. A family says what it can offer for a matrix, at which size and cost, and
solves for the option that was chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from masa.compression.allocation.bytes import Member, Option, Unit, allocate, uniform
from masa.compression.base import Compressor, Problem
from masa.compression.methods import few_bits
from masa.compression.methods.fits import Fit, dense_fit, part_sources
from masa.compression.methods.matrices import Matrix, check_cost
from masa.compression.methods.metrics import check_some_gradient
from masa.compression.methods.rounding import Rounding
from masa.errors import unknown
from masa.sharing.part_sources import guard_bytes
from masa.sharing.weight_sources import WeightSource

ALLOCATIONS = ("global", "uniform")


class Family:
    """Options of one kind for a matrix by itself."""

    name: str
    factors = 1
    """How many of its factors are rounded, one after the other, where numbers have few bits."""

    def options(self, matrix: Matrix, rule: str, shares: Sequence[float] | None, width: int) -> list[Option]:
        """What can be had.

        Args:
            matrix: with its statistics.
            rule: of the costs.
            shares: of the matrix's bytes that the options may take; None for a grid of the family's own.
            width: bytes of a value.
        """
        raise NotImplementedError

    def fit(self, matrix: Matrix, option: Option) -> list[Fit]:
        """Solve for one of them; the parts sum to the approximation."""
        raise NotImplementedError

    def configs(self, option: Option) -> list[dict[str, Any]]:
        """The parts that it stores, as :func:`masa.sharing.parts.make_part` takes them."""
        raise NotImplementedError


class AsItIs(Family):
    """The matrix itself."""

    name = "dense"

    def options(self, matrix: Matrix, rule: str, shares: Sequence[float] | None, width: int) -> list[Option]:
        return [Option((matrix.member,), self.name, matrix.weight.numel() * width, 0.0)]

    def fit(self, matrix: Matrix, option: Option) -> list[Fit]:
        return [dense_fit(matrix.member, matrix.weight)]

    def configs(self, option: Option) -> list[dict[str, Any]]:
        return [{"kind": "dense"}]


def members_of(problem: Problem, letters: str) -> list[Member]:
    """All matrices of these projections, layer by layer."""
    return [(p, n) for n in problem.layers for p in letters if n in problem.shape.layers_of(p)]


@dataclass(frozen=True)
class Profile:
    """What does not depend on the budget.

    Attributes:
        idle: matrices that need not be stored.
        options: of every matrix by itself; None for uniform shares, whose options are made for the budget.
        groups: of matrices that may be stored together, each with the options for that, or None as above.
    """

    idle: frozenset[Member]
    options: dict[Member, list[Option]] | None
    groups: tuple[tuple[tuple[Member, ...], list[Option] | None], ...] = ()


class ByteCompressor(Compressor):
    """Base of the methods that spend bytes.

    Args:
        cost: of :data:`~masa.compression.methods.matrices.COSTS`.
        allocation: "global": matrices compete for one budget, and any may stay dense. "uniform": each gets the same
            share of its bytes.
        bits: that numbers may be stored with (:mod:`masa.sharing.grouped`), 16 for the dtype of the model: [8], or
            [16, 8, 4] to choose for each matrix. None for the dtype of the model.
    """

    def __init__(self, cost: str = "loss", allocation: str = "global", bits: Sequence[int] | None = None) -> None:
        self.cost, self.allocation, self.bits = cost, allocation, bits

    def families(self, log: dict[str, float]) -> list[Family]:
        """What matrices may choose from, besides staying dense.

        Args:
            log: receives jitters.
        """
        raise NotImplementedError

    def fit_group(self, problem: Problem, option: Option) -> list[Fit]:
        """Solve for an option that stores several matrices together."""
        raise NotImplementedError

    def needs_loss(self) -> bool:
        """Whether the gradients' moments are read."""
        return self.cost.startswith("loss")

    def matrix(self, problem: Problem, letter: str, layer: int) -> Matrix:
        return Matrix.of(problem, letter, layer, self.needs_loss())

    def prepare(self, problem: Problem) -> Profile:
        check_cost(self.cost)
        if self.allocation not in ALLOCATIONS:
            raise unknown("allocation", self.allocation, ALLOCATIONS)
        few_bits.check(self.bits)
        everything = members_of(problem, problem.projections)
        idle = frozenset(member for member in everything if self.matrix(problem, *member).idle)
        if self.needs_loss():
            check_some_gradient(problem, idle)
        return Profile(idle, None if self.allocation == "uniform" else self.options(problem, None, idle))

    def solve(self, problem: Problem, prepared: Profile) -> list[WeightSource]:
        width = problem.dtype.itemsize
        budget = width * problem.budget - guard_bytes(problem.shape, problem.projections, problem.dtype)
        dense = width * (problem.dense - sum(problem.numbers(letter) for letter, _ in prepared.idle))
        units = self.units(problem, prepared, min(1.0, budget / max(dense, 1)))
        chosen = (uniform if self.allocation == "uniform" else allocate)(units, budget, dense)
        self.cost_ = sum(option.cost for option in chosen)
        self.chosen_ = dict(Counter(option.kind for option in chosen))
        self.bytes_ = {
            "+".join(f"{letter}{layer}" for letter, layer in option.members): [option.kind, option.size]
            for option in chosen
        }
        if self.bits:
            self.bits_ = dict(Counter(str(option.settings.get("bits", "as it was")) for option in chosen))
        return part_sources(problem, self.fits(problem, chosen))

    def units(self, problem: Problem, prepared: Profile, share: float) -> list[Unit]:
        """What competes, or takes ``share`` of its bytes: one unit a matrix, unless several may be stored together.

        Args:
            prepared: what :meth:`prepare` returned.
        """
        found = self.singles(problem, prepared, share)
        return [Unit([options]) for options in found.values()]

    def singles(self, problem: Problem, prepared: Profile, share: float) -> dict[Member, list[Option]]:
        """Options of every matrix by itself, those of the profile, or made for a share."""
        return self.options(problem, [share], prepared.idle) if prepared.options is None else prepared.options

    def options(
        self, problem: Problem, shares: Sequence[float] | None, idle: Collection[Member]
    ) -> dict[Member, list[Option]]:
        """Of every matrix by itself: dense first, then what the families offer that is smaller.

        Args:
            shares: see :meth:`Family.options`.
            idle: matrices that need not be stored.
        """
        width = problem.dtype.itemsize
        families, found = self.families(problem.regularisation), dict[Member, list[Option]]()
        everything = members_of(problem, problem.projections)
        for done, (letter, layer) in enumerate(everything):
            problem.progress("profiling", done, len(everything))
            if (letter, layer) in idle:
                found[letter, layer] = [Option(((letter, layer),), "nothing", 0, 0.0)]
                continue
            matrix = self.matrix(problem, letter, layer)
            (dense,) = AsItIs().options(matrix, self.cost, None, width)
            tried = None if shares is None else few_bits.wider(shares, self.bits, width)
            offered = [o for family in families for o in family.options(matrix, self.cost, tried, width)]
            whole = [dense, *(o for o in offered if o.size < dense.size)]
            found[matrix.member] = self.stored_with_bits(problem, matrix, whole)
        problem.progress("profiling", len(everything), len(everything))
        return found

    def stored_with_bits(self, problem: Problem, matrix: Matrix, options: list[Option]) -> list[Option]:
        """Options of a matrix, dense first, in the dtype of the model and with few bits, as far as either may be."""
        if not self.bits:
            return options
        log, width = problem.regularisation, problem.dtype.itemsize

        def of(option: Option) -> tuple[list[dict[str, Any]], int]:
            family = self.family(option.kind, log)
            return family.configs(option), family.factors

        few = few_bits.added(options, [matrix], of, self.cost, self.bits, log, width)
        return few if few_bits.AS_IT_IS in self.bits else [*options[:1], *few]

    def family(self, kind: str, log: dict[str, float]) -> Family:
        """The family of an option."""
        return next(f for f in (AsItIs(), *self.families(log)) if f.name == kind)

    def fits(self, problem: Problem, chosen: Sequence[Option]) -> list[Fit]:
        """Solve for all that was chosen."""
        found: list[Fit] = []
        for done, option in enumerate(sorted(chosen, key=lambda o: o.members[0][1])):
            problem.progress("solving", done, len(chosen))
            found += self.solved(problem, option)
        problem.progress("solving", len(chosen), len(chosen))
        return found

    def solved(self, problem: Problem, option: Option, inputs: Tensor | None = None) -> list[Fit]:
        """The parts of one option.

        Args:
            inputs: E[x x^T] to be solved for in the place of the calibration's.
        """
        (letter, layer), *others = option.members
        bits, log = option.settings.get("bits"), problem.regularisation
        if option.kind == "nothing":
            found = [Fit({"kind": "nothing"}, option.members)]
        elif option.kind == "dense" and not bits:
            found = [dense_fit(option.members[0], problem.weight(letter, layer))]
        elif others:
            found = self.fit_group(problem, option)
        else:
            matrix = self.matrix(problem, letter, layer)
            if inputs is not None and bool(inputs.any()):
                matrix.inputs = inputs
            found = self.family(option.kind, log).fit(matrix, option)
            if bits:
                found = Rounding([matrix], bits, log).fits(found)
        return [fit.rounded(problem.dtype) for fit in found]
