"""Sparse in place: which entries of a matrix stay where they are, and what the others' loss is made up for by.

It is the sparse dictionary whose atoms are the inputs themselves. Everything is float64; (out, in) of one weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from masa.compression.methods.algebra import cholesky
from masa.compression.methods.coding import TINY, largest, largest_overall, refit_codes
from masa.compression.methods.matrices import Matrix
from masa.errors import unknown

SCORES = ("magnitude", "wanda", "second-order", "loss")
COMPENSATIONS = ("none", "columns", "exact", "loss")
DAMPING = 0.01
BLOCK = 128
"""Columns between two updates of all that come after."""


def score(matrix: Matrix, rule: str) -> Tensor:
    """How much each entry counts (out, in); only the order of entries that compete matters.

    Args:
        rule: "magnitude": w^2. "wanda": w^2 E[x^2], the square of ``|w| ||x||`` (Sun et al. 2023, arXiv 2306.11695).
            "second-order": w^2 / [H^-1]_jj (Hassibi and Stork 1993). "loss": w^2 E[x^2] E[g^2] (ours).

    Raises:
        MasaError: another rule.
    """
    squares = matrix.weight.square()
    if rule == "magnitude":
        return squares
    if rule == "wanda":
        return squares * matrix.energies
    if rule == "second-order":
        assert matrix.inputs is not None
        return squares / torch.cholesky_inverse(damped_root(matrix.inputs, matrix.name, {})).diagonal()
    if rule == "loss":
        return squares * matrix.energies * matrix.importance[:, None]
    raise unknown("score", rule, SCORES)


def keep_in_rows(values: Tensor, count: int) -> Tensor:
    """The mask of ``count`` entries, equally many in each row; what does not divide goes to the largest of the next."""
    rows = len(values)
    each, rest = divmod(count, rows)
    counts = torch.full((rows,), each, device=values.device)
    if rest:
        ahead = values.sort(1, descending=True).values[:, each]
        counts[ahead.topk(rest).indices] += 1
    return largest(values.T, counts).T


def keep_two_of_four(values: Tensor) -> Tensor:
    """The mask of the two largest of every four neighbours in a row; the last group may be shorter."""
    out, inp = values.shape
    padded = torch.nn.functional.pad(values, (0, -inp % 4), value=-1.0).view(-1, 4)
    return largest(padded.T, 2).T.reshape(out, -1)[:, :inp] & (values >= 0)


def keep(values: Tensor, count: int, scope: str) -> Tensor:
    """The mask of ``count`` entries with the largest values, over all of the matrix or in each row."""
    return keep_in_rows(values, count) if scope == "rows" else largest_overall(values, count)


def compensated(matrix: Matrix, mask: Tensor, rule: str, log: dict[str, float], iterations: int = 12) -> Tensor:
    """W on the support ``mask``, with the entries that stay moved to make up for those that go.

    Args:
        rule: "none". "columns": column by column, as SparseGPT does (:func:`eliminate`). "exact": the best on this
            support for the outputs, by conjugate gradients. "loss": the best for the loss, where outputs, too, make up
            for each other (ours).
        log: of jitters.
        iterations: of the conjugate gradients.
    """
    if rule == "none" or matrix.inputs is None:
        return matrix.weight * mask
    if rule == "columns":
        return eliminate(matrix, mask, log)[0]
    if rule not in COMPENSATIONS:
        raise unknown("compensation", rule, COMPENSATIONS)
    gram, weight, support = matrix.inputs, matrix.weight.T.contiguous(), mask.T.contiguous()
    target = gram @ weight
    if rule == "exact" or matrix.outputs is None:
        return refit_codes(gram, target, support, weight, None, iterations).T
    start = refit_codes(gram, target, support, weight, None, iterations // 2)  # near enough, at a third of the cost
    return refit_codes(gram, target @ matrix.outputs, support, start, matrix.outputs, iterations).T


def eliminate(
    matrix: Matrix, mask: Tensor | None, log: dict[str, float], keep_share: float = 0.5, pattern: bool = False
) -> tuple[Tensor, Tensor]:
    """Set entries to zero column by column and move the columns after each, as SparseGPT does (arXiv 2301.00774).

    Args:
        mask: what stays (out, in); None to choose, block by block, by the error that each entry's loss leaves.
        keep_share: of the entries of a block, without a mask.
        pattern: choose two of every four.

    Returns:
        the matrix, and its mask.
    """
    assert matrix.inputs is not None
    upper = inverse_root(matrix.inputs, matrix.name, log)
    chosen = torch.zeros_like(matrix.weight, dtype=torch.bool) if mask is None else mask

    def settle(part: Tensor, start: int, i: int) -> Tensor:
        pivots, end = upper.diagonal()[start : start + part.shape[1]], start + part.shape[1]
        if mask is None and not pattern and i == 0:
            count = round(keep_share * len(part) * end) - int(chosen[:, :start].sum())
            chosen[:, start:end] = largest_overall(part.square() / pivots.square(), count)
        if mask is None and pattern and i % 4 == 0:
            near = slice(i, min(i + 4, part.shape[1]))
            chosen[:, start + near.start : start + near.stop] = keep_two_of_four(
                part[:, near].square() / pivots[near].square()
            )
        return part[:, i] * chosen[:, start + i]

    return column_by_column(matrix.weight, upper, settle), chosen


def column_by_column(weight: Tensor, upper: Tensor, settle: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """Settle one column of a matrix (out, in) after the other; those after each are moved to make up for its error.

    Args:
        upper: of :func:`inverse_root` of what enters.
        settle: (a block's columns as they are by now, which column of the matrix its first is, which of it) -> what
            that column becomes (out,).
    """
    weight, inp = weight.clone(), weight.shape[1]
    for start in range(0, inp, BLOCK):
        end = min(start + BLOCK, inp)
        part, pivots = weight[:, start:end].clone(), upper.diagonal()[start:end]
        errors = torch.zeros_like(part)
        for i in range(end - start):
            settled = settle(part, start, i)
            errors[:, i] = (part[:, i] - settled) / pivots[i]
            part[:, i + 1 :] -= errors[:, i : i + 1] * upper[start + i, start + i + 1 : end]
            part[:, i] = settled
        weight[:, start:end] = part
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight


def inverse_root(gram: Tensor, name: str, log: dict[str, float]) -> Tensor:
    """The upper Cholesky factor of the inverse of E[x x^T] (in, in), damped."""
    return torch.linalg.cholesky(torch.cholesky_inverse(damped_root(gram, name, log)), upper=True)


def damped_root(gram: Tensor, name: str, log: dict[str, float], damping: float = DAMPING) -> Tensor:
    """A Cholesky factor of a Gram matrix with a part of its mean diagonal added: 1 %, as SparseGPT and GPTQ have it."""
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean().clamp_min(TINY))
    return cholesky(damped, name, log)
