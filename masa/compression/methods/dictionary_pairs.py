"""Pairs of matrices, or larger groups, that share a dictionary: GeoPair (arXiv 2609.25963), and ours in one budget."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partialmethod
from typing import Any

import torch

from masa.compression.allocation.bytes import Member, Option, Unit
from masa.compression.allocation.matching import distances, groups
from masa.compression.base import Problem, register
from masa.compression.methods import few_bits
from masa.compression.methods.algebra import cholesky
from masa.compression.methods.dictionaries import Side
from masa.compression.methods.equal_bytes import ByteCompressor, Family, Profile, members_of
from masa.compression.methods.fits import Fit, dictionary_fit
from masa.compression.methods.matrices import Matrix
from masa.compression.methods.rounding import Rounding
from masa.compression.methods.shared_dictionaries import Group
from masa.compression.methods.sparse_dictionary import Dictionary, dictionary_sizes
from masa.errors import MasaError

SHARES = (0.9, 0.8, 0.65, 0.5, 0.35)
RATIOS = [2.5]
ETA = 1e-4
"""Added to every H before dictionaries are shared, relative to its mean diagonal: GeoPair's eta."""


def matched(
    problem: Problem, letters: Sequence[str], size: int, loss: bool, idle: Collection[Member] = ()
) -> list[list[Member]]:
    """Groups of matrices with one input width, of any projection and layer, nearest as their own data see them.

    Projections share only where the same layers have them.

    Args:
        letters: projections that may share.
        size: of a group at most, a power of two.
        loss: weigh outputs by the loss.
        idle: matrices that need no place in a group.

    Returns:
        Groups of two and more.
    """
    found: list[list[Member]] = []
    shape = problem.shape
    for width, layers in dict.fromkeys((shape.shapes[p][1], shape.layers_of(p)) for p in letters):
        alike = [p for p in letters if shape.shapes[p][1] == width and shape.layers_of(p) == layers]
        members = [member for member in members_of(problem, "".join(alike)) if member not in idle]
        whitened = []
        for done, (letter, layer) in enumerate(members):
            problem.progress("matching", done, len(members))
            matrix = Matrix.of(problem, letter, layer, loss)
            side = Side.of(matrix, "in", "diagonal" if loss else "none", problem.regularisation)
            x = side.x if side.metric is None else side.x * side.metric.sqrt()
            if side.left is not None:
                x = cholesky(side.left, side.name, side.log).T @ x
            whitened.append(x.float())
        found += [[members[i] for i in group] for group in groups(distances(whitened), size)]
    return [group for group in found if len(group) > 1]


@register("dictionary-pairs")
class DictionaryPairs(ByteCompressor):
    """GeoPair: pairs share a dictionary at uniform reduction (arXiv 2609.25963); every bit counted.

    Args:
        cost, allocation, bits: of :class:`~masa.compression.methods.equal_bytes.ByteCompressor`. "uniform": every group
            is stored together. "global": only a group that costs less together than apart at the same bytes may be.
        outputs: how the loss enters the fit: "none" or "diagonal".
        scope: "columns" or "matrix", see :meth:`~masa.compression.methods.shared_dictionaries.Group.thresholded`.
        ratios: k / s to choose from.
        group_size: matrices that share, at most: 1 is the control without sharing, 2 pairs, else a power of two.
        shared: letters that may share; None for all.
        rounds: of pursuit and exact dictionaries.
    """

    def __init__(
        self,
        cost: str = "whitened",
        allocation: str = "uniform",
        outputs: str = "none",
        scope: str = "columns",
        ratios: Sequence[float] = RATIOS,
        group_size: int = 2,
        shared: str | None = None,
        rounds: int = 4,
        bits: Sequence[int] | None = None,
    ) -> None:
        super().__init__(cost, allocation, bits)
        self.outputs, self.scope, self.ratios = outputs, scope, ratios
        self.group_size, self.shared, self.rounds = group_size, shared, rounds

    def needs_loss(self) -> bool:
        return self.cost.startswith("loss") or self.outputs != "none"

    def families(self, log: dict[str, float]) -> list[Family]:
        side, ratios = ("short", sorted({1.5, *self.ratios})) if self.allocation == "global" else ("in", self.ratios)
        return [Dictionary(side, self.outputs, self.scope, 0.0, ratios, self.rounds, log)]

    def prepare(self, problem: Problem) -> Profile:
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size & (size - 1):
            raise MasaError(f"group_size must be a power of two, at least 1, got {size!r}.")
        found = super().prepare(problem)
        letters = [p for p in problem.projections if self.shared is None or p in self.shared]
        members = matched(problem, letters, size, self.outputs != "none", found.idle) if size > 1 else []
        groups = []
        for done, group in enumerate(members):
            problem.progress("profiling groups", done, len(members))
            groups.append((tuple(group), None if found.options is None else self.joint(problem, group, None)))
        return replace(found, groups=tuple(groups))

    def units(self, problem: Problem, prepared: Profile, share: float) -> list[Unit]:
        left, found = dict(self.singles(problem, prepared, share)), []
        for group, joint in prepared.groups:
            apart = [left.pop(member) for member in group]
            if joint is None:
                room = share * sum(max(o.size for o in options) for options in apart)
                tried = few_bits.wider([share], self.bits, problem.dtype.itemsize)
                found.append(Unit(apart, [o for o in self.joint(problem, group, tried) if o.size <= room]))
            else:
                found.append(Unit(apart, [o for o in joint if better_together(o, apart)]))
        self.offered_ = sum(bool(unit.joint) for unit in found)
        return found + [Unit([options]) for options in left.values()]

    def group(self, problem: Problem, members: Sequence[Member]) -> tuple[list[Matrix], Group]:
        """The matrices and what is to be solved for."""
        matrices = [self.matrix(problem, letter, layer) for letter, layer in members]
        sides = [Side.of(m, "in", self.outputs, problem.regularisation) for m in matrices]
        for side in sides:
            if side.left is not None:  # a common D is not determined where the data of no member reach
                side.left = side.left + ETA * side.left.diagonal().mean() * torch.eye(len(side.left)).to(side.left)
        return matrices, Group(sides)

    def joint(self, problem: Problem, members: Sequence[Member], shares: Sequence[float] | None) -> list[Option]:
        """Options of a group stored together, each with an exact dictionary, as the singles' are profiled."""
        matrices, group = self.group(problem, members)
        shapes = [problem.shape.shapes[letter] for letter, _ in members]
        width, start, found = problem.weight(*members[0]).element_size(), group.start(), []
        for share in SHARES if shares is None else shares:
            for ratio in self.ratios:
                sizes = dictionary_sizes(shapes, "in", share, ratio, width, shapes[0][1], capped=True)
                if sizes is None:
                    continue
                atoms, count, size = sizes
                code = group.dictionary(group.thresholded(start[:, :atoms], count, self.scope))
                cost = sum(m.cost(self.cost, (code.atoms @ c).T) for m, c in zip(matrices, code.codes, strict=True))
                found.append(Option(tuple(members), "pair", size, cost, {"atoms": atoms, "count": count}))
        return found if not self.bits else self._few(problem, matrices, found)

    def _few(self, problem: Problem, matrices: Sequence[Matrix], options: Sequence[Option]) -> list[Option]:
        """The same with few bits, and in the dtype of the model if that may be."""

        def of(option: Option) -> tuple[list[dict[str, Any]], int]:
            # how the coefficients divide among the members is not known yet: each may end in a group of its own
            counts = [option.settings["count"] - len(matrices) + 1, *[1] * (len(matrices) - 1)]
            return [{"kind": "sparse-dictionary", "atoms": option.settings["atoms"], "counts": counts}], 2

        how = (self.cost, self.bits or (), problem.regularisation, problem.dtype.itemsize)
        return few_bits.added(options, matrices, of, *how)

    def fit_group(self, problem: Problem, option: Option) -> list[Fit]:
        matrices, group = self.group(problem, option.members)
        code = group.thresholded(
            group.start()[:, : int(option.settings["atoms"])], int(option.settings["count"]), self.scope
        )
        code = group.improve(group.dictionary(code), self.rounds)
        found = [dictionary_fit(option.members, code.atoms, code.codes, code.masks, "in")]
        bits = option.settings.get("bits")
        return Rounding(matrices, bits, problem.regularisation).fits(found) if bits else found


def better_together(joint: Option, apart: Sequence[Sequence[Option]]) -> bool:
    """Whether no choice of an option for each member, of the same bytes at most, costs as little as all together do."""
    best = {0: 0.0}  # bytes -> least cost
    for options in apart:
        new: dict[int, float] = {}
        for size, cost in best.items():
            for option in options:
                if size + option.size <= joint.size:
                    key = size + option.size
                    new[key] = min(new.get(key, torch.inf), cost + option.cost)
        best = _front(new)
    return not best or joint.cost < min(best.values())


def _front(found: dict[int, float]) -> dict[int, float]:
    """Without what costs more and takes more."""
    kept: dict[int, float] = {}
    least = torch.inf
    for size in sorted(found):
        if found[size] < least:
            kept[size] = least = found[size]
    return kept


@register("dictionary-pairs-fisher")
class DictionaryPairsFisher(DictionaryPairs):
    """Pairs, singles and dense matrices under one budget, in the metric of the loss (ours). Needs gradients.

    Args:
        cost, allocation, outputs, scope, ratios, group_size, shared, rounds, bits: of :class:`DictionaryPairs`.
    """

    __init__ = partialmethod(
        DictionaryPairs.__init__, cost="loss-diagonal", allocation="global", outputs="diagonal", scope="matrix"
    )
