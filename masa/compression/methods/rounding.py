"""Numbers of a solved-for part brought to few bits, so that what rounding does to outputs is made up for.

A matrix is rounded column by column, and the columns after each make up for its error (GPTQ, Frantar et al. 2022, arXiv
2210.17323); what was pruned stays pruned. Of two factors one is rounded first, the other is solved for again beside it,
and then rounded in the metric of what the first makes of the data. Everything is float64 until it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from masa.compression.methods.algebra import cholesky
from masa.compression.methods.coding import TINY, refit_codes
from masa.compression.methods.fits import Fit
from masa.compression.methods.matrices import Matrix
from masa.compression.methods.pruning import DAMPING
from masa.sharing.grouped import GROUPS, SMALLEST, half, in_groups, reach

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Parts of a group's reach that its grid may have: what it then lacks is clipped, and the rest is finer."""

BLOCK = 128
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
    scales, least = reach(rows, bits)
    scales, least = stored_as(scales, least, rows)
    middle = least + 7.5 * scales if bits == 4 else torch.zeros_like(least)
    best, found = torch.full_like(scales, torch.inf), (scales, least)
    for part in SHRINK:
        tried, low = stored_as(scales * part, middle - 7.5 * scales * part if bits == 4 else least, rows)
        error = (rows - nearest(rows, tried[:, None], low[:, None], bits)).nan_to_num(0.0)
        lost = (counted * error.square()).sum(1)
        better = lost < best
        best = torch.where(better, lost, best)
        found = torch.where(better, tried, found[0]), torch.where(better, low, found[1])
    return found


def stored_as(scales: Tensor, least: Tensor, like: Tensor) -> Grid:
    """A grid as float16 has it."""
    return half(scales).clamp_min(SMALLEST).to(like), half(least).to(like)


def nearest(values: Tensor, scales: Tensor, least: Tensor, bits: int) -> Tensor:
    """The nearest numbers of a grid, given for every value or so that it broadcasts."""
    if bits == 8:
        return (values / scales).round().clamp(-127, 127) * scales
    return ((values - least) / scales).round().clamp(0, 15) * scales + least


def of_every(values: Tensor, found: Grid, bits: int) -> tuple[Tensor, Tensor]:
    """The scale and least value of every number, in the shape of ``values``."""
    scales, least = (t.repeat_interleave(GROUPS[bits])[: values.numel()].view(values.shape) for t in found)
    return scales, least


def rounded_columns(
    target: Tensor, mask: Tensor | None, scales: Tensor, least: Tensor, bits: int, gram: Tensor | None, upper: Tensor
) -> Tensor:
    """``target`` (out, in) on a grid, where ``mask`` is true, and zero elsewhere.

    Args:
        scales, least: (out, in).
        gram: unused where None: without data there is nothing to make up for.
        upper: Cholesky factor of the inverse of the damped E[x x^T], upper triangular.
    """
    weight, inp = target.clone(), target.shape[1]
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    if gram is None:
        return nearest(weight, scales, least, bits) * kept
    for start in range(0, inp, BLOCK):
        end = min(start + BLOCK, inp)
        part, pivots = weight[:, start:end].clone(), upper.diagonal()[start:end]
        errors = torch.zeros_like(part)
        for i in range(end - start):
            at = start + i
            settled = nearest(part[:, i], scales[:, at], least[:, at], bits) * kept[:, at]
            errors[:, i] = (part[:, i] - settled) / pivots[i]
            part[:, i + 1 :] -= errors[:, i : i + 1] * upper[at, at + 1 : end]
            part[:, i] = settled
        weight[:, start:end] = part
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight


class Rounding:
    """Fits of one matrix, or of several that have a part in common, brought to few bits.

    Args:
        matrices: the members.
        bits: of a number.
        log: of jitters.
    """

    def __init__(self, matrices: Sequence[Matrix], bits: int, log: dict[str, float]) -> None:
        self.matrices, self.bits, self.log = list(matrices), bits, log
        self._kinds = {
            "dense": self._dense,
            "sparse": self._sparse,
            "low-rank": self._low_rank,
            "sparse-dictionary": self._dictionary,
        }

    def fits(self, found: Sequence[Fit]) -> list[Fit]:
        """The same parts with few bits; each part but the first makes up for the errors of those before it."""
        missing: Tensor | None = None
        done = []
        for fit in found:
            done.append(self._kinds[fit.config["kind"]](fit, missing))
            if len(found) > 1:  # of one matrix
                error = self._product(fit) - self._product(done[-1])
                missing = error if missing is None else missing + error
        return done

    def _product(self, fit: Fit) -> Tensor:
        """What a fit of one matrix is (out, in)."""
        if fit.config["kind"] == "low-rank":
            return (fit.tensors["right"].double() @ fit.tensors["left"].double()).T
        if fit.config["kind"] == "sparse":
            matrix, mask = fit.packed["packed"]
            return matrix.double() * mask
        return fit.tensors["weight"].double()

    def _few(self, fit: Fit) -> Fit:
        return Fit({**fit.config, "bits": self.bits}, fit.members)

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
        upper = target if gram is None else _inverse_root(gram, name, self.log)
        return rounded_columns(target, mask, scales, least, self.bits, gram, upper), found

    def _dense(self, fit: Fit, missing: Tensor | None) -> Fit:
        (matrix,), new = self.matrices, self._few(fit)
        target = matrix.weight if missing is None else matrix.weight + missing
        new.tensors["weight"], new.grids["weight"] = self._columns(target, None, matrix.inputs, matrix.name)
        return new

    def _sparse(self, fit: Fit, missing: Tensor | None) -> Fit:
        (matrix,), new = self.matrices, self._few(fit)
        values, mask = fit.packed["packed"]
        target = values.double() * mask
        target = target if missing is None else target + missing
        found, new.grids["packed"] = self._columns(target, mask, matrix.inputs, matrix.name)
        new.packed["packed"] = found, mask
        return new

    def _low_rank(self, fit: Fit, missing: Tensor | None) -> Fit:
        """A is rounded, B solved for again so that B A is nearest to what it was, and rounded."""
        (matrix,), new = self.matrices, self._few(fit)
        left, right = fit.tensors["left"].double(), fit.tensors["right"].double()
        new.grids["right"] = found = grid(right, self.bits)
        new.tensors["right"] = down = nearest(right, *of_every(right, found, self.bits), self.bits)
        target = (right @ left).T if missing is None else (right @ left).T + missing
        weighed = down if matrix.inputs is None else matrix.inputs @ down
        gram = down.T @ weighed
        again = torch.cholesky_solve((target @ weighed).T, _damped_root(gram, matrix.name, self.log)).T
        found_left, scales = self._columns_across(again, gram, matrix.name)
        new.tensors["left"], new.grids["left"] = found_left.T, scales
        return new

    def _columns_across(self, factor: Tensor, gram: Tensor, name: str) -> tuple[Tensor, Grid]:
        """A factor (out, k) that is stored as (k, out), rounded in the metric (k, k) of what enters it."""
        stored = factor.T.contiguous()
        weights = gram.diagonal().clamp_min(TINY)[:, None].expand_as(stored)
        found = grid(stored, self.bits, weights)
        scales, least = (t.T for t in of_every(stored, found, self.bits))
        upper = _inverse_root(gram, name, self.log)
        return rounded_columns(factor, None, scales, least, self.bits, gram, upper), found

    def _dictionary(self, fit: Fit, missing: Tensor | None) -> Fit:
        """D is rounded; every C is solved for again on its places, and rounded."""
        new, inside = self._few(fit), fit.config["side"] == "in"
        atoms = fit.tensors["atoms"].double()
        new.grids["atoms"] = found = grid(atoms, self.bits)
        new.tensors["atoms"] = down = nearest(atoms, *of_every(atoms, found, self.bits), self.bits)
        for i, matrix in enumerate(self.matrices):
            values, mask = fit.packed[f"codes.{i}"]
            if inside:  # C^T (out, k) is stored: its rows see D^T H D
                weighed = down if matrix.inputs is None else matrix.inputs @ down
                gram = down.T @ weighed
                again = refit_codes(gram, weighed.T @ matrix.weight.T, mask.T, values.double().T).T
                result, new.grids[f"codes.{i}"] = self._columns(again, mask, gram, matrix.name)
            else:  # C (k, in): its rows see the inputs, its columns D^T G D
                seen = down if matrix.outputs is None else matrix.importance[:, None] * down
                again = refit_codes(seen.T @ down, seen.T @ matrix.weight, mask, values.double())
                result, new.grids[f"codes.{i}"] = self._columns(again, mask, matrix.inputs, matrix.name)
            new.packed[f"codes.{i}"] = result, mask
        return new


def _damped_root(gram: Tensor, name: str, log: dict[str, float]) -> Tensor:
    damped = gram.clone()
    damped.diagonal().add_(1e-8 * gram.diagonal().mean().clamp_min(TINY))
    return cholesky(damped, name, log)


def _inverse_root(gram: Tensor, name: str, log: dict[str, float]) -> Tensor:
    """The upper Cholesky factor of the inverse of a Gram matrix, damped as SparseGPT and GPTQ damp theirs."""
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * gram.diagonal().mean().clamp_min(TINY))
    return torch.linalg.cholesky(torch.cholesky_inverse(cholesky(damped, name, log)), upper=True)
