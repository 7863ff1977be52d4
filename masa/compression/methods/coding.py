"""Sparse coefficients for a given dictionary, and the best dictionary for given ones. Everything is float64.

Approximate X (m, n) by D C with D (m, k) and a sparse C (k, n), where errors E = X - D C count as ``tr(A E B E^T)``
with A (m, m) and B (n, n). B may be a vector (n,), its diagonal, or None, the identity: then columns of C are solved
for each by itself, and B drops out of them.

Hard-thresholding pursuit (Foucart 2011, arXiv 1008.1843): a gradient step, the largest entries stay, and a refit on
these. Here gradients are scaled by the diagonal of the Gram matrix ``D^T A D``, and a step that does not lower the
error is not taken, so that the error never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masa.compression.methods.algebra import cholesky

TINY = 1e-300


def right(matrix: Tensor, metric: Tensor | None) -> Tensor:
    """``M B`` for a full, a diagonal or no metric B."""
    if metric is None:
        return matrix
    return matrix * metric if metric.ndim == 1 else matrix @ metric


def objective(error: Tensor, left: Tensor | None, metric: Tensor | None) -> float:
    """``tr(A E B E^T)``."""
    weighed = error if left is None else left @ error
    return float((weighed * right(error, metric)).sum())


def largest(score: Tensor, counts: Tensor | int) -> Tensor:
    """The mask of the ``counts`` largest entries of each column of a score (k, n); exact where scores tie.

    Args:
        counts: (n,), or the same for all.
    """
    order = score.argsort(dim=0, descending=True, stable=True)
    ranks = torch.arange(len(score), device=score.device)[:, None]
    kept = (ranks < counts).expand_as(score)
    return torch.zeros_like(kept).scatter(0, order, kept)


def largest_overall(score: Tensor, count: int) -> Tensor:
    """The mask of the ``count`` largest entries of a score of any shape."""
    flat = score.flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(min(count, len(flat)), sorted=False).indices] = True
    return mask.view(score.shape)


def refit_codes(
    gram: Tensor,
    target: Tensor,
    mask: Tensor,
    start: Tensor,
    metric: Tensor | None = None,
    iterations: int = 10,
    tolerance: float = 1e-5,
) -> Tensor:
    """The C with the given support that is best: conjugate gradients on ``mask * (M C B) = mask * R``.

    Args:
        gram: M = D^T A D (k, k).
        target: R = D^T A X B (k, n); without B where B is not full.
        mask, start: support, and a C on it (k, n).
        metric: B where it is full; else columns are independent, and each has its own step.
        iterations, tolerance: at most, and the relative residual at which it ends.
    """
    full = metric is not None and metric.ndim == 2
    scale = gram.diagonal()[:, None] * (metric.diagonal() if full else 1.0)
    inverse = torch.where(mask, 1 / scale.clamp_min(TINY), 0.0)

    def product(x: Tensor) -> Tensor:
        return (gram @ (x @ metric if full else x)) * mask

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum() if full else (a * b).sum(0)

    codes = start * mask
    residual = target * mask - product(codes)
    ahead = residual * inverse
    direction, energy = ahead, inner(residual, ahead)
    goal = tolerance**2 * inner(target * mask, target * inverse)
    for _ in range(iterations):
        if bool((energy <= goal).all()):
            break
        spread = product(direction)
        curvature = inner(direction, spread)
        step = torch.where(curvature > TINY, energy / curvature.clamp_min(TINY), 0.0)
        codes = codes + step * direction
        residual = residual - step * spread
        ahead = residual * inverse
        new = inner(residual, ahead)
        direction = ahead + torch.where(energy > TINY, new / energy.clamp_min(TINY), 0.0) * direction
        energy = new
    return codes


def step_size(gram: Tensor) -> float:
    """1 / the largest eigenvalue of ``P^-1/2 M P^-1/2`` with P = diag M: the longest step that is sure to descend."""
    root = gram.diagonal().clamp_min(TINY).rsqrt()
    return 1 / max(float(torch.linalg.eigvalsh(root[:, None] * gram * root)[-1]), TINY)


def pursue(
    gram: Tensor,
    target: Tensor,
    codes: Tensor,
    mask: Tensor,
    metric: Tensor | None = None,
    steps: int = 2,
    iterations: int = 10,
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    """Hard-thresholding pursuit: as many entries of each column stay as before, perhaps others.

    Args:
        gram, target, codes, mask, metric, iterations: see :func:`refit_codes`.
        steps: gradient steps.
        whole: entries compete over the whole matrix and not in each column.

    Returns:
        C and its mask; no column's error is larger than before (with a full B, or ``whole``: not the whole error).
    """
    full = metric is not None and metric.ndim == 2
    together = full or whole
    scale = gram.diagonal().clamp_min(TINY)[:, None]
    weights = scale * (1.0 if metric is None else metric.diagonal() if full else metric)
    size, counts = step_size(gram), mask.sum(0)
    if full:
        size *= step_size(metric)

    def error(x: Tensor) -> Tensor:  # but for a constant
        value = x * (gram @ (x @ metric if full else x) - 2 * target)
        if not together:
            return value.sum(0)
        return (value if full or metric is None else value * metric).sum()

    best = error(codes)
    for _ in range(steps):
        residual = target - gram @ (codes @ metric if full else codes)
        moved = codes + size * residual / (weights if full else scale)
        score = moved.square() * weights
        new = largest_overall(score, int(counts.sum())) if whole else largest(score, counts)
        refitted = refit_codes(gram, target, new, moved, metric, iterations)
        found = error(refitted)
        better = found < best
        if not bool(better.any()):
            break
        codes, mask = torch.where(better, refitted, codes), torch.where(better, new, mask)
        best = torch.where(better, found, best)
    return codes, mask


def refit_dictionary(x: Tensor, codes: Tensor, metric: Tensor | None, name: str, log: dict[str, float]) -> Tensor:
    """The best D (m, k) for a C (k, n): ``X B C^T (C B C^T)^-1``; A drops out.

    Args:
        name, log: as for :func:`~masa.compression.methods.algebra.cholesky`, for atoms that depend on each other.
    """
    weighed = right(codes, metric)
    factor = cholesky(used(weighed @ codes.T), name, log)
    return torch.cholesky_solve((x @ weighed.T).T, factor).T


def used(gram: Tensor) -> Tensor:
    """With a 1 on the diagonal for atoms that no column uses, whose equations are empty."""
    idle = gram.diagonal() <= 0
    return gram + torch.diag(idle.to(gram.dtype) * gram.diagonal().mean().clamp_min(TINY))


def normalised(atoms: Tensor, codes: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The same products with atoms of norm 1."""
    norms = atoms.norm(dim=0)
    norms = torch.where(norms > 0, norms, 1.0)
    return atoms / norms, [c * norms[:, None] for c in codes]
