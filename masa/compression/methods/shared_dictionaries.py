"""One dictionary for several matrices, each with its own metrics and sparse coefficients (GeoPair, arXiv 2609.25963).

``min over D, C_i of sum_i tr(A_i E_i B_i E_i^T)`` with ``E_i = X_i - D C_i``; D lives in the original space. For one
and two matrices D is exact; three terms have no basis in common, and their normal equations are solved by conjugate
gradients. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from masa.compression.methods.algebra import cholesky
from masa.compression.methods.coding import (
    TINY,
    largest_overall,
    normalised,
    pursue,
    refit_codes,
    refit_dictionary,
    right,
)
from masa.compression.methods.dictionaries import STANDS, Code, Side, keep_in_columns

RIDGE = 1e-9
"""Added to ``C B C^T``, relative to its mean diagonal, for atoms that a matrix does not use."""


@dataclass
class SharedCode:
    """D (m, k), and C_i (k, n_i) with its mask for each matrix."""

    atoms: Tensor
    codes: list[Tensor]
    masks: list[Tensor]


def simultaneous(first: Tensor, second: Tensor, name: str, log: dict[str, float]) -> tuple[Tensor, Tensor]:
    """P and l with ``P^T first P = I`` and ``P^T second P = diag l``.

    Args:
        first, second: symmetric (n, n); the first positive definite, or made so by a jitter.
        name, log: as for :func:`~masa.compression.methods.algebra.cholesky`.
    """
    lower = cholesky(first, name, log)
    half = torch.linalg.solve_triangular(lower, second, upper=False)
    inner = torch.linalg.solve_triangular(lower, half.T, upper=False)
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    return torch.linalg.solve_triangular(lower.T, vectors, upper=True), values.clamp_min(0)


def sylvester(
    lefts: tuple[Tensor, Tensor],
    grams: tuple[Tensor, Tensor],
    target: Tensor,
    name: str,
    log: dict[str, float],
    known: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The D (m, k) of ``A_1 D S_1 + A_2 D S_2 = K``, exactly, by two generalised eigenproblems.

    Args:
        known: the solution of the first of them, of ``simultaneous(*lefts)``, which is the same for any S and K.
    """
    p, lam = known or simultaneous(*lefts, name, log)
    q, sigma = simultaneous(*grams, name, log)
    return p @ ((p.T @ target @ q) / (1 + lam[:, None] * sigma)) @ q.T


def conjugate(
    lefts: Sequence[Tensor], grams: Sequence[Tensor], target: Tensor, start: Tensor, name: str, log: dict[str, float]
) -> Tensor:
    """The D of ``sum_i A_i D S_i = K`` for any number of terms, by conjugate gradients.

    Preconditioned by ``(sum A_i)^-1 R (sum S_i)^-1``, which would be exact, but for its scale, if all were alike.
    """
    above = cholesky(sum(lefts[1:], lefts[0]), name, log)
    beside = cholesky(sum(grams[1:], grams[0]), name, log)

    def product(d: Tensor) -> Tensor:
        return sum((a @ d @ s for a, s in zip(lefts, grams, strict=True)), torch.zeros_like(d))

    def ahead(r: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(r, above).T, beside).T

    found, residual = start, target - product(start)
    z = ahead(residual)
    direction, energy = z, (residual * z).sum()
    goal = 1e-20 * (target * ahead(target)).sum()
    for _ in range(100):
        if float(energy) <= max(float(goal), TINY):
            break
        spread = product(direction)
        step = energy / (direction * spread).sum()
        found, residual = found + step * direction, residual - step * spread
        z = ahead(residual)
        new = (residual * z).sum()
        direction, energy = z + new / energy * direction, new
    return found


@dataclass
class Group:
    """Matrices of one height m that are to share a dictionary."""

    sides: list[Side]
    _known: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return " and ".join(side.name for side in self.sides)

    def start(self) -> Tensor:
        """Left singular vectors of all matrices beside each other (m, m): in the original space, never whitened."""
        total = sum((right(s.x, s.metric) @ s.x.T for s in self.sides), torch.zeros_like(self.sides[0].x[:, :1]))
        return torch.linalg.eigh(total).eigenvectors.flip(1)

    def error(self, code: SharedCode) -> float:
        """Summed over the matrices."""
        parts = zip(self.sides, code.codes, code.masks, strict=True)
        return sum(side.error(Code(code.atoms, c, mask)) for side, c, mask in parts)

    def thresholded(self, atoms: Tensor, count: int, scope: str) -> SharedCode:
        """The best dense coefficients for D, of which the ``count`` most important in all matrices stay.

        Args:
            scope: "columns": equally many a column; "matrix": those that matter most over all matrices.
        """
        codes, scores = [], []
        for side in self.sides:
            weighed = atoms if side.left is None else side.left @ atoms
            gram = weighed.T @ atoms
            codes.append(torch.cholesky_solve(weighed.T @ side.x, cholesky(gram, side.name, side.log)))
            score = codes[-1].square() * gram.diagonal()[:, None]
            metric = side.metric
            scores.append(score if metric is None else score * (metric if metric.ndim == 1 else metric.diagonal()))
        joined = torch.cat(scores, 1)
        mask = largest_overall(joined, count) if scope == "matrix" else keep_in_columns(joined, count)
        masks = list(mask.split([c.shape[1] for c in codes], 1))
        return SharedCode(atoms, [c * m for c, m in zip(codes, masks, strict=True)], masks)

    def dictionary(self, code: SharedCode) -> SharedCode:
        """The best D for these coefficients."""
        used = [(side, c) for side, c in zip(self.sides, code.codes, strict=True) if bool(c.any())]
        if not used:
            return code  # of matrices of zeros; any dictionary is the best
        first = used[0][0]
        if len(used) == 1:
            atoms = refit_dictionary(first.x, used[0][1], first.metric, self.name, first.log)
            return SharedCode(atoms, code.codes, code.masks)
        eye = torch.eye(len(first.x), dtype=code.atoms.dtype, device=code.atoms.device)
        lefts = [eye if side.left is None else side.left for side, _ in used]
        weighed = [right(c, side.metric) for side, c in used]
        grams = [_ridged(w @ c.T) for w, (_, c) in zip(weighed, used, strict=True)]
        target = torch.zeros_like(code.atoms)
        for left, (side, _), w in zip(lefts, used, weighed, strict=True):
            target += left @ side.x @ w.T
        if len(used) == 2:
            both = (lefts[0], lefts[1])
            if len(self.sides) > 2:
                known = None
            else:
                known = self._known = self._known or simultaneous(*both, self.name, first.log)
            atoms = sylvester(both, (grams[0], grams[1]), target, self.name, first.log, known)
        else:
            atoms = conjugate(lefts, grams, target, code.atoms, self.name, first.log)
        return SharedCode(atoms, code.codes, code.masks)

    def pursued(self, code: SharedCode, steps: int = 2, iterations: int = 10) -> SharedCode:
        """Coefficients of every matrix by pursuit, D as it is but for the norms of its atoms."""
        atoms, codes = normalised(code.atoms, code.codes)
        found, masks = [], []
        for side, c, mask in zip(self.sides, codes, code.masks, strict=True):
            gram, target = side.gram(atoms)
            c, mask = pursue(gram, target, c, mask, side.metric, steps, iterations)
            found.append(refit_codes(gram, target, mask, c, side.metric, iterations))
            masks.append(mask)
        return SharedCode(atoms, found, masks)

    def improve(self, code: SharedCode, rounds: int) -> SharedCode:
        """Rounds until the error stands in the fifth digit; a half of one that does not lower it is not taken."""
        error = self.error(code)
        for _ in range(rounds):
            before = error
            for half in (self.pursued, self.dictionary):
                found = half(code)
                if (now := self.error(found)) < error:
                    code, error = found, now
            if before - error < STANDS * before:
                break
        return code


def _ridged(gram: Tensor) -> Tensor:
    ridge = RIDGE * gram.diagonal().mean().clamp_min(TINY)
    return gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
