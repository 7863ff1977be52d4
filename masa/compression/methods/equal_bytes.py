"""The frame of all methods whose budget is in bytes: options of every matrix, one allocation, then the fits.

A method is a list of families of options. A family says what it can offer for a matrix, at which size and cost, and
solves for the option that was chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from masa.compression.allocation.bytes import Option, Unit, allocate, uniform
from masa.compression.base import Compressor, Problem
from masa.compression.methods.fits import Fit, dense_fit, part_bytes, part_sources
from masa.compression.methods.matrices import Matrix, check_cost
from masa.errors import unknown
from masa.sharing.part_sources import guard_bytes
from masa.sharing.weight_sources import WeightSource

ALLOCATIONS = ("global", "uniform")


class Family:
    """Options of one kind for a matrix by itself."""

    name: str

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


class ByteCompressor(Compressor):
    """Base of the methods that spend bytes.

    Args:
        cost: of :data:`~masa.compression.methods.matrices.COSTS`.
        allocation: "global": matrices compete for one budget, and any may stay dense. "uniform": each gets the same
            share of its bytes.
    """

    def __init__(self, cost: str = "loss", allocation: str = "global") -> None:
        self.cost, self.allocation = cost, allocation

    def families(self, log: dict[str, float]) -> list[Family]:
        """What matrices may choose from, besides staying dense.

        Args:
            log: receives jitters.
        """
        raise NotImplementedError

    def groups(self, problem: Problem) -> list[Unit]:
        """Matrices that may be stored together; the singles of these units are filled in here."""
        return []

    def fit_group(self, problem: Problem, option: Option) -> list[Fit]:
        """Solve for an option of :meth:`groups`."""
        raise NotImplementedError

    def needs_loss(self) -> bool:
        """Whether the gradients' moments are read."""
        return self.cost == "loss"

    def matrix(self, problem: Problem, letter: str, layer: int) -> Matrix:
        return Matrix.of(problem, letter, layer, self.needs_loss())

    def prepare(self, problem: Problem) -> dict[tuple[str, int], list[Option]] | None:
        """Options of every matrix for any budget; none for uniform shares, whose options are made for the budget."""
        check_cost(self.cost)
        if self.allocation not in ALLOCATIONS:
            raise unknown("allocation", self.allocation, ALLOCATIONS)
        return None if self.allocation == "uniform" else self._options(problem, None)

    def solve(self, problem: Problem, prepared: Any) -> list[WeightSource]:
        width = problem.weight(problem.projections[0], 0).element_size()
        budget = width * problem.budget - guard_bytes(
            problem.projections, len(problem.layers), problem.weight(problem.projections[0], 0).dtype
        )
        dense = width * problem.dense
        if prepared is None:
            prepared = self._options(problem, [budget / dense])
        units = self.units(problem, prepared)
        chosen = (uniform if self.allocation == "uniform" else allocate)(units, budget, dense)
        self.cost_ = sum(option.cost for option in chosen)
        self.chosen_ = dict(Counter(option.kind for option in chosen))
        self.bytes_ = {
            "+".join(f"{letter}{layer}" for letter, layer in option.members): [option.kind, option.size]
            for option in chosen
        }
        return part_sources(problem, self._fits(problem, chosen))

    def units(self, problem: Problem, prepared: dict[tuple[str, int], list[Option]]) -> list[Unit]:
        """One a matrix."""
        return [Unit([options]) for options in prepared.values()]

    def _options(self, problem: Problem, shares: Sequence[float] | None) -> dict[tuple[str, int], list[Option]]:
        width = problem.weight(problem.projections[0], 0).element_size()
        families, found = self.families(problem.regularisation), dict[tuple[str, int], list[Option]]()
        for layer in problem.layers:
            problem.progress("profiling", layer, len(problem.layers))
            for letter in problem.projections:
                matrix = self.matrix(problem, letter, layer)
                shape = problem.shape.shapes[letter]
                whole = part_bytes({"kind": "dense"}, [shape], width)
                options = [o for family in families for o in family.options(matrix, self.cost, shares, width)]
                found[matrix.member] = [
                    Option((matrix.member,), "dense", whole, 0.0),
                    *(o for o in options if o.size < whole),
                ]
        problem.progress("profiling", len(problem.layers), len(problem.layers))
        return found

    def _fits(self, problem: Problem, chosen: Sequence[Option]) -> list[Fit]:
        families = {family.name: family for family in self.families(problem.regularisation)}
        fits: list[Fit] = []
        for done, option in enumerate(sorted(chosen, key=lambda o: o.members[0][1])):
            problem.progress("solving", done, len(chosen))
            (letter, layer), *others = option.members
            weight: Tensor = problem.weight(letter, layer)
            if option.kind == "dense":
                found = [dense_fit(option.members[0], weight)]
            elif others:
                found = self.fit_group(problem, option)
            else:
                found = families[option.kind].fit(self.matrix(problem, letter, layer), option)
            fits += [fit.rounded(weight.dtype) for fit in found]
        problem.progress("solving", len(chosen), len(chosen))
        return fits
