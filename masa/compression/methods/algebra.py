"""Truncation in the metric of the data, and linear solves with a reported jitter. Everything is float64.

Dimensions: (out, in) of a weight, r rank, H = X^T X (in, in) of the inputs X (tokens, in).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from masa.errors import MasaError

EPS = torch.finfo(torch.float64).eps


@dataclass
class Truncation:
    """The best approximations of one weight at every rank.

    It does not hold the weight itself, so that a kept truncation pins no model.

    Attributes:
        shape: (out, in).
        left: orthonormal U (out, k), columns in order of energy; ``U_r U_r^T W`` is the best rank-r approximation.
            Kept in float32 unless W is float64, since all matrices' are held at once.
        energy: (k,) squared singular values of W H^(1/2), descending: the tail ``energy[r:].sum()`` is the output
            error ``||X W^T - X W_r^T||_F^2``.
        total: ``tr(W H W^T)``, the squared norm of the output itself.
        root: makes R (out, out), lower triangular, again, where errors are measured as ``||R^T dW H^(1/2)||`` (and U is
            of R^T W); not kept, since all matrices' truncations are held at once.
    """

    shape: tuple[int, int]
    left: Tensor
    energy: Tensor
    total: float
    root: Callable[[], Tensor] | None = None

    def factors(self, rank: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in) with equal norms, column by row, of the W (out, in) that this was made of."""
        left, weight = self.left[:, :rank].double(), weight.double()
        if self.root is None:
            right = left.T @ weight
        else:
            root = self.root()
            right = left.T @ (root.T @ weight)
            left = torch.linalg.solve_triangular(root.T, left, upper=True)
        balance = right.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        return left * balance, right / balance[:, None]


def nothing(weight: Tensor) -> Truncation:
    """Of a weight (out, in) that does nothing: rank 0 is without error."""
    out, inp = weight.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    energy = torch.zeros(min(out, inp), dtype=torch.float64, device=weight.device)
    return Truncation((out, inp), weight.new_zeros(out, 0, dtype=dtype), energy, 0.0)


def truncation(weight: Tensor, gram: Tensor | None = None, root: Callable[[], Tensor] | None = None) -> Truncation:
    """Diagonalise ``W H W^T``: SVD-LLM's truncation-aware whitening (Wang et al. 2024) without the inverse.

    With ``W L_c = U S V^T`` (H = L_c L_c^T) the truncated product is ``U_r U_r^T W L_c``, so ``U_r U_r^T W`` is the
    published solution. It needs no inverse of L_c and is therefore exact for a rank-deficient H, without any jitter.

    Args:
        weight: W (out, in).
        gram: H (in, in), or None for the identity (plain SVD).
        root: makes R (out, out), lower triangular, of a metric R R^T on the outputs; None for the identity.
    """
    given, weight = weight, weight.double()
    if root is not None:
        weight = root().T @ weight
    out, inp = weight.shape
    if out <= inp:
        product = weight @ weight.T if gram is None else weight @ gram @ weight.T
        energy, left = torch.linalg.eigh((product + product.T) / 2)
        energy, left = energy.flip(0).clamp_min(0), left.flip(1)
    else:
        whitened = weight if gram is None else weight @ square_root(gram)
        left, singular, _ = torch.linalg.svd(whitened, full_matrices=False)
        energy = singular.square()
    left = left.to(torch.promote_types(given.dtype, torch.float32))
    return Truncation((given.shape[0], given.shape[1]), left, energy, float(energy.sum()), root)


def square_root(gram: Tensor) -> Tensor:
    """A factor R with R R^T = H for any positive semidefinite H; negative rounding is set to zero."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return vectors * values.clamp_min(0).sqrt()


def cholesky(gram: Tensor, name: str, log: dict[str, float]) -> Tensor:
    """Lower factor L of H + jitter * I, with the least jitter of 0, 1e-8, 1e-7, ... 1 times mean(diag H) that works.

    A pivot below rounding counts as a failure: such a factor exists only by luck.

    Args:
        gram: symmetric (n, n), float64.
        name: what H belongs to, the key in ``log``.
        log: receives the jitter, relative to mean(diag H), if it is not zero.

    Raises:
        MasaError: H is zero (what has such a metric does nothing and needs no factor) or not finite.
    """
    diagonal = gram.diagonal()
    scale = float(diagonal.mean())
    if not torch.isfinite(gram).all() or scale <= 0:
        raise MasaError(
            f"The autocorrelation of {name} is {'zero' if scale == 0 else 'not finite'}: its calibration holds broken "
            "numbers. Calibrate anew, in float32 if the model is stored in fewer bits."
        )
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for jitter in (0.0, *(10.0**k for k in range(-8, 1))):
        factor, info = torch.linalg.cholesky_ex(gram + jitter * scale * eye)
        if int(info) == 0 and float(factor.diagonal().min()) ** 2 > len(gram) * EPS * float(diagonal.max()):
            if jitter:
                log[name] = jitter
            return factor
    raise MasaError(f"The autocorrelation of {name} has no Cholesky factor even with jitter {jitter:g}.")


def refit(weight: Tensor, right: Tensor, gram: Tensor, name: str, log: dict[str, float]) -> Tensor:
    """The left factor that is best for a given right one on the data: ``B = W H A^T (A H A^T)^-1``.

    Args:
        weight: W (out, in); right: A (r, in); gram: H (in, in).
        name, log: as for :func:`cholesky`.

    Returns:
        B (out, r), float64; where no data reach the right factor, the best for the weight itself.
    """
    if not len(right):
        return weight.new_zeros(len(weight), 0, dtype=torch.float64)
    right = right.double()
    projected = gram @ right.T
    if not projected.any():
        return weight.double() @ torch.linalg.pinv(right)
    factor = cholesky(right @ projected, name, log)
    return torch.cholesky_solve((weight.double() @ projected).T, factor).T
