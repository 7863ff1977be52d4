"""From matrices and rank rules to :class:`~masa.sharing.compressed_sources.Factored` sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from masa.compression.allocation.ranks import Key
from masa.compression.base import Problem
from masa.compression.methods.algebra import Truncation
from masa.sharing.compressed_sources import Factored
from masa.sharing.weight_sources import WeightSource


@dataclass
class AtomGroup:
    """A dictionary of one projection: ``sum_s coefficients[i, s] atoms[s]`` for layer ``layers[i]``."""

    layers: list[int]
    atoms: Tensor  # (S, out, in)
    coefficients: Tensor  # (n, S)

    def numbers(self) -> int:
        return self.atoms.numel() + self.coefficients.numel()


Factors = dict[Key, tuple[Tensor, Tensor]]
"""Key -> B (n * out, r) and A (r, in); None stands for dense."""


def factorise(
    truncations: Mapping[Key, Truncation], ranks: Mapping[Key, int | None], weight: Callable[[Key], Tensor]
) -> Factors:
    """Factors of every matrix that is not dense; float32 unless the weights are float64, as all are held at once.

    Args:
        weight: key -> the matrix (n * out, in) that was truncated.
    """
    found: Factors = {}
    for key, rank in ranks.items():
        if rank is not None:
            left, right = truncations[key].factors(rank, weight(key))
            found[key] = left.to(truncations[key].left.dtype), right.to(truncations[key].left.dtype)
    return found


@torch.no_grad()
def factored_sources(
    problem: Problem,
    factors: Factors,
    ranks: Mapping[Key, int | None],
    atoms: Mapping[str, list[AtomGroup]] | None = None,
) -> list[WeightSource]:
    """One source a projection, in the dtype and on the device of the model's weights.

    Args:
        factors: of the matrices with a rank.
        ranks: of all matrices; None keeps its layers dense.
        atoms: dictionaries by projection.
    """
    sources: list[WeightSource] = []
    for letter in problem.projections:
        position = {layer: i for i, layer in enumerate(problem.layers_of(letter))}  # as sources count layers
        keys = [key for key in ranks if key[0] == letter]
        dense = [layer for key in keys if ranks[key] is None for layer in key[1]]
        low = [key for key in keys if ranks[key]]
        # a dictionary serves only the layers that are not dense
        groups = [g for g in (atoms or {}).get(letter, []) if len(g.atoms) and set(g.layers) - set(dense)]
        rows = [[i for i, layer in enumerate(g.layers) if layer not in dense] for g in groups]
        source = Factored(
            letter,
            len(position),
            problem.shape.shapes[letter],
            atoms=[
                {"layers": [position[g.layers[i]] for i in row], "atoms": len(g.atoms)}
                for g, row in zip(groups, rows, strict=True)
            ],
            factors=[{"layers": [position[layer] for layer in key[1]], "rank": ranks[key]} for key in low],
            dense=[position[layer] for layer in dense],
            transposed=True,
        ).to(problem.weight(letter, next(iter(position))))
        for i, (group, row) in enumerate(zip(groups, rows, strict=True)):
            source.mixed[i].atoms.copy_(group.atoms)
            source.mixed[i].coefficients.copy_(group.coefficients[row])
        for i, key in enumerate(low):
            source.factors[i].fill(*orthonormal(*factors[key]))
        for i, layer in enumerate(dense):
            source.stored[i].weight.copy_(problem.weight(letter, layer))
        sources.append(source)
    return sources


def orthonormal(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product B A with orthonormal rows in A, so that multiplying by one after the other loses no digits.

    As whitening leaves them, B is as large as A is small in some directions, and B (A x) would be rounded there a
    hundred times more than (B A) x.
    """
    q, r = torch.linalg.qr(right.double().mT)
    return left.double() @ r.mT, q.mT


def ranks_by_projection(ranks: Mapping[Key, int | None]) -> dict[str, list[list]]:
    """JSON-able: projection -> [[layers, rank or "dense"], ...]."""
    table: dict[str, list[list]] = {}
    for (letter, layers), rank in ranks.items():
        table.setdefault(letter, []).append([list(layers), "dense" if rank is None else rank])
    return table
