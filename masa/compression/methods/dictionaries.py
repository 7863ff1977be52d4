"""One matrix as a dictionary with sparse coefficients, in closed form and by pursuit. Everything is float64.

As in the papers, X (m, n) ~ D C: of the input side X = W^T (in, out), of the output side X = W (out, in); D (m, k) is
dense, C (k, n) sparse, and errors count as ``tr(A E B E^T)`` (:mod:`masa.compression.methods.coding`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from masa.compression.methods.algebra import EPS, cholesky, square_root
from masa.compression.methods.coding import (
    TINY,
    largest,
    largest_overall,
    normalised,
    objective,
    pursue,
    refit_codes,
    refit_dictionary,
    right,
    used,
)
from masa.compression.methods.matrices import Matrix

STANDS = 1e-5
"""Relative gain of a round below which a pursuit ends."""


@dataclass
class Code:
    """D (m, k), C (k, n) and the mask of what stays of it."""

    atoms: Tensor
    codes: Tensor
    mask: Tensor


@dataclass
class Side:
    """A matrix seen from one side, with the metrics of both.

    Attributes:
        x: (m, n).
        left: A (m, m), or None.
        metric: B (n, n), (n,) or None.
        name, log: for jitters.
    """

    x: Tensor
    left: Tensor | None
    metric: Tensor | None
    name: str
    log: dict[str, float]

    @classmethod
    def of(cls, matrix: Matrix, side: str, outputs: str, log: dict[str, float]) -> Side:
        """The input or the output side of a matrix.

        Args:
            outputs: how the loss's metric of the outputs enters: "none", "diagonal" or "full".
        """
        seen: Tensor | None = None
        if matrix.outputs is not None and outputs != "none":
            seen = matrix.importance if outputs == "diagonal" else matrix.outputs
        if side == "in":
            return cls(matrix.weight.T, matrix.inputs, seen, matrix.name, log)
        full = torch.diag(seen) if seen is not None and seen.ndim == 1 else seen
        return cls(matrix.weight, full, matrix.inputs, matrix.name, log)

    def basis(self) -> Basis:
        """The directions of D that matter most, ROCKET's first steps (arXiv 2602.11008)."""
        x, upper = self.x, None
        if self.left is not None:
            upper = cholesky(self.left, self.name, self.log).T
            x = upper @ x
        whitened = x
        if self.metric is not None:
            whitened = x * self.metric.sqrt() if self.metric.ndim == 1 else x @ square_root(self.metric)
        if x.shape[0] <= x.shape[1]:
            _, vectors = torch.linalg.eigh(whitened @ whitened.T)
            vectors = vectors.flip(1)
        else:
            energy, short = torch.linalg.eigh(whitened.T @ whitened)
            kept = energy > len(energy) * EPS * energy[-1].clamp_min(TINY)
            kept[-1] = True  # also of a matrix of zeros
            vectors = torch.linalg.qr(whitened @ short[:, kept].flip(1)).Q
        atoms = vectors if upper is None else torch.linalg.solve_triangular(upper, vectors, upper=True)
        return Basis(self, atoms, vectors.T @ x, atoms.norm(dim=0), x, float(whitened.square().sum()))

    def error(self, code: Code) -> float:
        """``tr(A E B E^T)``."""
        return objective(self.x - code.atoms @ code.codes, self.left, self.metric)

    def gram(self, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """``D^T A D`` and ``D^T A X``, the latter with B where it is full."""
        weighed = atoms if self.left is None else self.left @ atoms
        target = weighed.T @ self.x
        full = self.metric is not None and self.metric.ndim == 2
        return weighed.T @ atoms, target @ self.metric if full else target

    def refit(self, codes: Tensor, mask: Tensor) -> Code:
        """The best dictionary for given coefficients."""
        return Code(refit_dictionary(self.x, codes, self.metric, f"atoms of {self.name}", self.log), codes, mask)

    def round(self, code: Code, steps: int = 2, iterations: int = 10) -> Code:
        """A pursuit of the coefficients, then the best dictionary for them (GeoPair's steps, arXiv 2609.25963)."""
        atoms, (codes,) = normalised(code.atoms, [code.codes])
        gram, target = self.gram(atoms)
        codes, mask = pursue(gram, target, codes, code.mask, self.metric, steps, iterations)
        codes = refit_codes(gram, target, mask, codes, self.metric, iterations)
        return self.refit(codes, mask)

    def improve(self, code: Code, rounds: int) -> Code:
        """Rounds until the error stands in the fifth digit; one that does not lower it is not taken."""
        error = self.error(code)
        for _ in range(rounds):
            found = self.round(code)
            now = self.error(found)
            if not now < error:
                break
            gain, code, error = (error - now) / error, found, now
            if gain < STANDS:
                break
        return code


@dataclass
class Basis:
    """Directions in order of what they explain, and the dense coefficients of all of them.

    Attributes:
        of: the side.
        atoms: ``L^-1 b_i`` (m, r), with A = L^T L.
        codes: ``b_i^T L X`` (r, n).
        lengths: norms of the atoms (r,).
        rooted, total: L X, and ``tr(A X B X^T)``.
    """

    of: Side
    atoms: Tensor
    codes: Tensor
    lengths: Tensor
    rooted: Tensor
    total: float

    def kept(self, atoms: int, count: int, scope: str = "columns", weight_space: float = 0.5) -> tuple[Tensor, Tensor]:
        """The most important coefficients of the first k directions, and the mask of them.

        Args:
            atoms: k.
            count: coefficients that stay.
            scope: "columns": equally many of each column (what does not divide goes to the largest of the next);
                "matrix": those that matter most over all of it.
            weight_space: power of the norms of the atoms in the importance of a coefficient, ROCKET's lambda: 0 is best
                in the metric, 1 in weight space.
        """
        codes = self.codes[:atoms]
        metric = self.of.metric
        score = codes.square() * self.lengths[:atoms, None].pow(2 * weight_space)
        if metric is not None:
            score = score * (metric if metric.ndim == 1 else metric.diagonal())
        mask = largest_overall(score, count) if scope == "matrix" else keep_in_columns(score, count)
        return codes * mask, mask

    def code(self, atoms: int, count: int, scope: str = "columns", weight_space: float = 0.5) -> Code:
        """The closed form: :meth:`kept`, and the best dictionary for them."""
        return self.of.refit(*self.kept(atoms, count, scope, weight_space))

    def error(self, codes: Tensor) -> float:
        """The error that the best dictionary leaves, ``tr(A X B X^T) - tr(T (C B C^T)^-1 T^T)``, T = L X B C^T."""
        weighed = right(codes, self.of.metric)
        factor = cholesky(used(weighed @ codes.T), f"atoms of {self.of.name}", self.of.log)
        explained = torch.linalg.solve_triangular(factor, weighed @ self.rooted.T, upper=False)
        return max(0.0, self.total - float(explained.square().sum()))


def keep_in_columns(score: Tensor, count: int) -> Tensor:
    """The mask of ``count`` entries, equally many a column; what does not divide goes to the largest of the next."""
    columns = score.shape[1]
    each, rest = divmod(min(count, score.numel()), columns)
    counts = torch.full((columns,), each, device=score.device)
    if rest:
        ahead = score.sort(0, descending=True).values[each]
        counts[ahead.topk(rest).indices] += 1
    return largest(score, counts)


def weighed_error(side: Side, code: Code) -> Tensor:
    """``A E B``, to which the rows of C are orthogonal once D is the best."""
    error = side.x - code.atoms @ code.codes
    return right(error if side.left is None else side.left @ error, side.metric)
