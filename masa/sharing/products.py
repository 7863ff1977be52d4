"""How a weight that is not stored is multiplied by: atoms mixed or their outputs, low-rank factors one after the other.

Dimensions: T tokens, S atoms, r rank, N mixtures, (out, in) of one weight.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

_CHUNK = 1 << 18
"""Numbers of atoms that are converted to float32 at once while a weight of fewer bits is mixed: they stay in cache."""


def autocast_dtype(like: Tensor) -> torch.dtype:
    """The dtype in which linear layers will run on ``like``: autocast's where it is on, else its own."""
    return torch.get_autocast_dtype(like.device.type) if _under_autocast(like) else like.dtype


def full_precision(like: Tensor) -> AbstractContextManager:
    """Switch autocast off on the device of ``like``, where it is on."""
    return torch.autocast(like.device.type, enabled=False) if _under_autocast(like) else nullcontext()


def _under_autocast(like: Tensor) -> bool:
    device = like.device.type
    # whether a device has autocast at all is a question that torch 2.11 cannot compile
    return device != "meta" and torch.is_autocast_enabled(device)


def on_device_of(weight: Tensor, x: Tensor) -> Tensor:
    """``x`` where the weight is: a device map may have put the shared sources elsewhere than the layer."""
    return x if x.device == weight.device else x.to(weight.device)


def mix(coefficients: Tensor, atoms: Tensor) -> Tensor:
    """Linear combinations of atoms as one GEMM (Eq. 2): (N, S) x (S, out, in) -> (N, out, in).

    Mixed in float32 at least, whatever autocast says (bfloat16 keeps three digits of a coefficient), then cast once
    to the dtype in which the linear layers will run.
    """
    exact = torch.promote_types(atoms.dtype, torch.float32)
    with full_precision(atoms):
        stack = coefficients.to(exact) @ atoms.to(exact).flatten(1)
    return stack.to(autocast_dtype(atoms)).view(-1, *atoms.shape[1:])


def mix_one(coefficients: Tensor, atoms: Tensor) -> Tensor:
    """One mixture (S) x (S, out, in) -> (out, in), as :func:`mix` makes it, without a float32 copy of all atoms."""
    exact = torch.promote_types(atoms.dtype, torch.float32)
    differentiated = torch.is_grad_enabled() and (atoms.requires_grad or coefficients.requires_grad)
    if atoms.dtype == exact or differentiated:
        return mix(coefficients.unsqueeze(0), atoms).squeeze(0)
    out = torch.empty(atoms.shape[1:], dtype=autocast_dtype(atoms), device=atoms.device)
    rows = max(1, _CHUNK * (1 if atoms.device.type == "cpu" else 64) // (len(atoms) * atoms.shape[2]))
    with full_precision(atoms):
        for part, result in zip(atoms.split(rows, dim=1), out.split(rows), strict=True):
            result.copy_((coefficients.to(exact) @ part.to(exact).flatten(1)).view(result.shape))
    return out


def at_most(x: Tensor, tokens: int) -> bool:
    """Whether (..., in) holds so few tokens; an exported program, which is for any number, is made for many."""
    return not torch.compiler.is_exporting() and x.numel() <= tokens * x.shape[-1]


def mixes_outputs(x: Tensor, atoms: Tensor) -> bool:
    """Whether S products of a few tokens cost less than one mixture of S atoms; either reads every atom once.

    On a CPU in float32 mixing is the faster of both even for one token, as it reads the longer rows; with fewer bits
    it also converts. On a GPU skinny products are free.
    """
    if atoms.device.type != "cpu":
        return at_most(x, 32)
    return atoms.element_size() < 4 and at_most(x, 16)


def linear_in_atoms(x: Tensor, coefficients: Tensor, atoms: Tensor, bias: Tensor | None) -> Tensor:
    """``y = x (sum_s c_s D_s)^T + b`` (Eq. 2), (..., in) -> (..., out).

    For few tokens as ``sum_s c_s (x D_s^T)``, summed in float32 at least; else the weight is mixed and thrown away.
    """
    x = on_device_of(atoms, x)
    count, out, inp = atoms.shape
    if count == 1:  # scaling what comes out is always less than scaling the matrix
        y = nn.functional.linear(x, atoms.squeeze(0))
        y = y * coefficients.to(y.dtype)
        return y if bias is None else y + bias.to(y.dtype)
    if not mixes_outputs(x, atoms):
        return nn.functional.linear(x, mix_one(coefficients, atoms), bias)
    outputs = nn.functional.linear(x, atoms.reshape(count * out, inp)).unflatten(-1, (count, out))
    exact = torch.promote_types(outputs.dtype, torch.float32)
    with full_precision(atoms):
        y = torch.matmul(coefficients.to(exact), outputs.to(exact))
        if bias is not None:
            y = y + bias.to(exact)
    return y.to(outputs.dtype)


def linear_in_factors(x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """``y = (x A^T) B^T + b`` with B (out, r) and A (r, in), (..., in) -> (..., out)."""
    return nn.functional.linear(nn.functional.linear(on_device_of(right, x), right), left, bias)
