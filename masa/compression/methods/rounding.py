"""Numbers of a solved-for part brought to few bits, so that what rounding does to outputs is made up for.

A matrix is rounded column by column, and the columns after each make up for its error (GPTQ, Frantar et al. 2022, arXiv
2210.17323); what was pruned stays pruned. Of two factors one is rounded first, the other is solved for again beside it,
and then rounded in the metric of what the first makes of the data. Everything is float64 until it is stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from masa.compression.allocation.bytes import Member
from masa.compression.methods.coding import TINY, refit_codes
from masa.compression.methods.fits import Fit
from masa.compression.methods.matrices import Matrix
from masa.compression.methods.pruning import column_by_column, damped_root, inverse_root
from masa.sharing.grouped import GROUPS, as_stored, in_groups, levels, reach

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Parts of a group's reach that its grid may have: what it then lacks is clipped, and the rest is finer."""

SLIGHT = 1e-8
"""Damping where a factor is solved for beside a rounded one."""

Grid = tuple[Tensor, Tensor]
"""Scales and least values of groups."""


def grid(values: Tensor, bits: int, weights: Tensor | None = None) -> Grid:
    """Scales and least values of the groups of ``values`` (any shape), with the least weighted squared error.

    Args:
        weights: of the squared errors, of the shape of the values; None for all alike.
    """
    rows = in_groups(values.flatten(), GROUPS[bits])
    counted = torch.ones_like(rows) if weights is None else in_groups(weights.flatten(), GROUPS[bits])
    counted = counted.nan_to_num(0.0)
    scales, least = as_stored(*reach(rows, bits))
    middle = least + 7.5 * scales if bits == 4 else torch.zeros_like(least)
    best, found = torch.full_like(scales, torch.inf), (scales, least)
    for part in SHRINK:
        tried, low = as_stored(scales * part, middle - 7.5 * scales * part if bits == 4 else least)
        error = (rows - nearest(rows, tried[:, None], low[:, None], bits)).nan_to_num(0.0)
        lost = (counted * error.square()).sum(1)
        better = lost < best
        best = torch.where(better, lost, best)
        found = torch.where(better, tried, found[0]), torch.where(better, low, found[1])
    return found


def nearest(values: Tensor, scales: Tensor, least: Tensor, bits: int) -> Tensor:
    """The nearest numbers of a grid, given for every value or so that it broadcasts."""
    return levels(values, scales, least, bits) * scales + least


def of_every(values: Tensor, found: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """The scale and least value of every number, in the shape of ``values``."""
    scales, least = (t.repeat_interleave(GROUPS[bits])[: values.numel()].view(values.shape) for t in found)
    return scales, least


def rounded_columns(
    target: Tensor, mask: Tensor | None, scales: Tensor, least: Tensor, bits: int, upper: Tensor | None
) -> Tensor:
    """``target`` (out, in) on a grid, where ``mask`` is true, and zero elsewhere.

    Args:
        scales, least: (out, in).
        upper: Cholesky factor of the inverse of the damped E[x x^T], upper triangular; None without data, where there
            is nothing to make up for.
    """
    kept = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    if upper is None:
        return nearest(target, scales, least, bits) * kept

    def settle(part: Tensor, start: int, i: int) -> Tensor:
        at = start + i
        return nearest(part[:, i], scales[:, at], least[:, at], bits) * kept[:, at]

    return column_by_column(target, upper, settle)


class Rounding:
    """Fits of matrices brought to few bits.

    Args:
        matrices: all members of the fits, with the statistics in whose metric errors count, if there are any.
        bits: of a number.
        log: of jitters.
    """

    def __init__(self, matrices: Sequence[Matrix], bits: int, log: dict[str, float]) -> None:
        self.matrices, self.bits, self.log = {m.member: m for m in matrices}, bits, log
        self._missing: dict[Member, Tensor] = {}
        self._times: Counter[Member] = Counter()
        self._kinds = {
            "dense": self._dense,
            "sparse": self._sparse,
            "low-rank": self._low_rank,
            "mixture": self._mixture,
            "sparse-dictionary": self._dictionary,
        }

    def fits(self, found: Sequence[Fit]) -> list[Fit]:
        """The same parts with few bits; of a sum each makes up for the errors of those before it."""
        self._times = Counter(member for fit in found for member in fit.members)
        self._missing, done = {}, []
        for fit in found:
            done.append(self._kinds[fit.config["kind"]](fit))
            for row, member in enumerate(fit.members):
                if self._times[member] > 1:
                    error = product(fit, row) - product(done[-1], row)
                    self._missing[member] = self._missing.get(member, 0.0) + error
        return done

    def _few(self, fit: Fit) -> Fit:
        return Fit({**fit.config, "bits": self.bits}, fit.members)

    def _of(self, fit: Fit) -> list[Matrix]:
        return [self.matrices[member] for member in fit.members]

    def _inputs(self, fit: Fit) -> Tensor | None:
        """E[x x^T] of all members together, None where nothing is known of one."""
        grams = [matrix.inputs for matrix in self._of(fit)]
        return None if any(g is None for g in grams) else sum(grams[1:], grams[0])

    def _name(self, fit: Fit) -> str:
        return ", ".join(matrix.name for matrix in self._of(fit))

    def _target(self, fit: Fit, row: int = 0) -> Tensor:
        """What a member's part is to be, with what the parts before it lack."""
        return product(fit, row) + self._missing.get(fit.members[row], 0.0)

    def _whole(self, fit: Fit, row: int) -> Tensor:
        """What a factor that is solved for again is to come near to: the matrix, where this part is all of it."""
        member = fit.members[row]
        return self.matrices[member].weight if self._times[member] == 1 else self._target(fit, row)

    def _columns(self, target: Tensor, mask: Tensor | None, gram: Tensor | None, name: str) -> tuple[Tensor, Grid]:
        """A matrix (out, in) rounded in the metric of its inputs, and its grid."""
        energies = None if gram is None else gram.diagonal().clamp_min(TINY).expand_as(target)
        if mask is None:
            found = grid(target, self.bits, energies)
            scales, least = of_every(target, found, self.bits)
        else:
            values = target[mask]
            found = grid(values, self.bits, None if energies is None else energies[mask])
            scales, least = torch.ones_like(target), torch.zeros_like(target)
            scales[mask], least[mask] = of_every(values, found, self.bits)
        upper = None if gram is None else inverse_root(gram, name, self.log)
        return rounded_columns(target, mask, scales, least, self.bits, upper), found

    def _nearest(self, values: Tensor) -> tuple[Tensor, Grid]:
        """Each number to the nearest of its group's."""
        found = grid(values, self.bits)
        return nearest(values, *of_every(values, found, self.bits), self.bits), found

    def _dense(self, fit: Fit) -> Fit:
        new, rows = self._few(fit), range(len(fit.members))
        target = sum((self._target(fit, row) for row in rows[1:]), self._target(fit)) / len(rows)
        new.tensors["weight"], new.grids["weight"] = self._columns(target, None, self._inputs(fit), self._name(fit))
        return new

    def _sparse(self, fit: Fit) -> Fit:
        new, mask = self._few(fit), fit.packed["packed"][1]
        found, new.grids["packed"] = self._columns(self._target(fit), mask, self._inputs(fit), self._name(fit))
        new.packed["packed"] = found, mask
        return new

    def _low_rank(self, fit: Fit) -> Fit:
        """A is rounded; every B is solved for again so that B A is nearest to what it was, and rounded."""
        new = self._few(fit)
        new.tensors["right"], new.grids["right"] = self._nearest(fit.tensors["right"].double())
        down, lefts, grams = new.tensors["right"], [], []
        for row, matrix in enumerate(self._of(fit)):
            weighed = down if matrix.inputs is None else matrix.inputs @ down
            grams.append(down.T @ weighed)
            target = self._whole(fit, row) @ weighed
            lefts.append(torch.cholesky_solve(target.T, damped_root(grams[-1], matrix.name, self.log, SLIGHT)))
        stored = torch.stack(lefts)  # (n, r, out)
        weights = torch.stack([g.diagonal().clamp_min(TINY) for g in grams])[:, :, None].expand_as(stored)
        found = new.grids["left"] = grid(stored, self.bits, weights)
        scales, least = of_every(stored, found, self.bits)
        for row, (matrix, gram) in enumerate(zip(self._of(fit), grams, strict=True)):
            upper = inverse_root(gram, matrix.name, self.log)
            lefts[row] = rounded_columns(lefts[row].T, None, scales[row].T, least[row].T, self.bits, upper).T
        new.tensors["left"] = lefts[0] if len(lefts) == 1 else torch.stack(lefts)
        return new

    def _mixture(self, fit: Fit) -> Fit:
        """Atoms are rounded; every layer's coefficients are solved for again."""
        new = self._few(fit)
        atoms, coefficients = fit.tensors["atoms"].double(), fit.tensors["coefficients"].double().clone()
        rounded = torch.empty_like(atoms)
        for s, atom in enumerate(atoms):
            rounded[s], new.grids[f"atoms.{s}"] = self._columns(atom, None, self._inputs(fit), self._name(fit))
        flat = rounded.flatten(1)
        for row, matrix in enumerate(self._of(fit)):
            weighed = flat if matrix.inputs is None else (rounded @ matrix.inputs).flatten(1)
            root = damped_root(weighed @ flat.T, matrix.name, self.log, SLIGHT)
            coefficients[row] = torch.cholesky_solve((weighed @ self._whole(fit, row).flatten())[:, None], root)[:, 0]
        new.tensors |= {"atoms": rounded, "coefficients": coefficients}
        return new

    def _dictionary(self, fit: Fit) -> Fit:
        """D is rounded; every C is solved for again on its places, and rounded."""
        new, inside = self._few(fit), fit.config["side"] == "in"
        new.tensors["atoms"], new.grids["atoms"] = self._nearest(fit.tensors["atoms"].double())
        down = new.tensors["atoms"]
        for i, matrix in enumerate(self._of(fit)):
            values, mask = fit.packed[f"codes.{i}"]
            target = self._whole(fit, i)
            if inside:  # C^T (out, k) is stored: its rows see D^T H D
                weighed = down if matrix.inputs is None else matrix.inputs @ down
                gram = down.T @ weighed
                again = refit_codes(gram, weighed.T @ target.T, mask.T, values.double().T).T
                found = self._columns(again, mask, gram, matrix.name)
            else:  # C (k, in): its rows see the inputs, its columns D^T G D
                seen = down if matrix.outputs is None else matrix.importance[:, None] * down
                again = refit_codes(seen.T @ down, seen.T @ target, mask, values.double())
                found = self._columns(again, mask, matrix.inputs, matrix.name)
            new.packed[f"codes.{i}"], new.grids[f"codes.{i}"] = (found[0], mask), found[1]
        return new


def product(fit: Fit, row: int) -> Tensor:
    """What a fit is for one of its members (out, in), in float64."""
    kind, tensors = fit.config["kind"], {name: t.double() for name, t in fit.tensors.items()}
    if kind == "dense":
        return tensors["weight"]
    if kind == "low-rank":
        left = tensors["left"]
        return (tensors["right"] @ (left if left.ndim == 2 else left[row])).T
    if kind == "mixture":
        return torch.tensordot(tensors["coefficients"][row], tensors["atoms"], 1)
    values, mask = fit.packed["packed" if kind == "sparse" else f"codes.{row}"]
    if kind == "sparse":
        return values.double() * mask
    code = values.double() * mask
    return code @ tensors["atoms"].T if fit.config["side"] == "in" else tensors["atoms"] @ code
