"""A sparse matrix as it is stored: one bit for every position, and the values that stay, in the order of the rows.

A bitmap is shorter than a list of positions as long as more than one value in 16 or so stays, which is always so here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from masa.sharing.grouped import held, put, stored
from masa.sharing.products import autocast_dtype


def pack_bits(mask: Tensor) -> Tensor:
    """Any bool tensor of n elements -> (ceil(n / 8),) uint8; the first element is the lowest bit of the first byte."""
    flat = mask.flatten().to(torch.uint8)
    padded = nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The first ``count`` bits as a bool tensor (count,)."""
    lanes = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(1) >> lanes) & 1).to(torch.bool).flatten()[:count]


class Packed(nn.Module):
    """A sparse matrix (rows, columns), packed; called, it is written out for this call, and nothing of it is kept.

    Args:
        rows, columns: of the matrix.
        count: values that stay; where others would be, the matrix is zero.
        bits, group: of the values (:class:`~masa.sharing.grouped.Grouped`); None for numbers of the model's dtype.
    """

    positions: Tensor

    def __init__(self, rows: int, columns: int, count: int, bits: int | None = None, group: int | None = None) -> None:
        super().__init__()
        self.rows, self.columns, self.count = rows, columns, count
        self.values = stored((count,), bits, group)
        self.positions = nn.Buffer(torch.zeros(-(-rows * columns // 8), dtype=torch.uint8))

    @torch.no_grad()
    def fill(self, matrix: Tensor, mask: Tensor, grid: tuple[Tensor, Tensor] | None = None) -> None:
        """Keep ``matrix`` (rows, columns) where ``mask`` is true, at ``count`` places.

        Args:
            grid: of its values, see :func:`~masa.sharing.grouped.put`.
        """
        put(self.values, matrix[mask], grid)
        self.positions.copy_(pack_bits(mask))

    def consistent(self) -> bool:
        """Whether there are as many positions as values."""
        found = unpack_bits(self.positions, 8 * len(self.positions))
        inside = self.rows * self.columns
        return int(found[:inside].sum()) == self.count and not bool(found[inside:].any())

    def forward(self) -> Tensor:
        mask = unpack_bits(self.positions, self.rows * self.columns).view(self.rows, self.columns)
        values = held(self.values)
        values = values.to(autocast_dtype(values))
        return values.new_zeros(self.rows, self.columns).masked_scatter(mask, values)
