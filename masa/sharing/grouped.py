"""Numbers as they are stored with few bits: whole numbers of 8 or 4 bits, in groups that have a scale in common.

Groups run over all numbers of a tensor, one row after the other. Scales are float16 whatever the model computes in;
they are kept as their bits, so that casting a model changes no number of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from masa.errors import MasaError, unknown
from masa.sharing.products import autocast_dtype
from masa.sharing.weight_sources import call

BITS = (8, 4)
GROUPS = {8: 64, 4: 32}
"""Bits -> numbers that have a scale in common: 8.25 and 5 bits a number are stored."""

SMALLEST = 2.0**-24
"""The smallest positive float16."""


class Grouped(nn.Module):
    """A tensor of whole numbers u of ``bits`` bits; called, it is written out for this call, and nothing of it is kept.

    8 bits: ``(u - 128) scale``. 4 bits: ``u scale + least``, as groups of so few values are seldom centred.

    Args:
        shape: of the tensor.
        bits: of a number.
        group: numbers that have a scale in common; the last may be shorter. None for that of :data:`GROUPS`.

    Raises:
        MasaError: other bits, or groups of no number.
    """

    numbers: Tensor
    scales: Tensor
    least: Tensor

    def __init__(self, shape: Sequence[int], bits: int, group: int | None = None) -> None:
        super().__init__()
        if bits not in BITS:
            raise unknown("Bits of a number:", bits, BITS)
        self.shape, self.bits, self.group = tuple(shape), int(bits), int(group or GROUPS[bits])
        if self.group < 1 or self.group % 2:
            raise MasaError(f"A group has an even number of numbers, got {group!r}.")
        self.count = math.prod(self.shape)
        groups = -(-self.count // self.group)
        self.numbers = nn.Buffer(torch.zeros(-(-self.count * self.bits // 8), dtype=torch.uint8))
        self.scales = nn.Buffer(torch.zeros(groups, dtype=torch.int16))
        self.least = nn.Buffer(torch.zeros(groups if self.bits == 4 else 0, dtype=torch.int16))
        self.like = nn.Parameter(torch.empty(0))  # of no element: it says in which dtype the model computes
        self.trained: nn.ParameterList | None = None

    @torch.no_grad()
    def fill(self, values: Tensor, scales: Tensor | None = None, least: Tensor | None = None) -> None:
        """Round to the nearest numbers.

        Args:
            values: of the tensor's shape.
            scales, least: of every group, to be rounded to float16; None for those that reach its extremes.
        """
        exact = torch.promote_types(values.dtype, torch.float32)
        rows = in_groups(values.to(exact).flatten(), self.group)
        if scales is None:
            scales, least = reach(rows, self.bits)
        assert least is not None
        scales, least = as_stored(scales.to(exact), least.to(exact))
        self.scales.copy_(scales.half().view(torch.int16))
        if self.bits == 4:
            self.least.copy_(least.half().view(torch.int16))
        found = levels(rows.nan_to_num(0.0), scales[:, None], least[:, None], self.bits)
        if self.bits == 8:
            found = found + 128
        flat = found.flatten()[: self.count].to(torch.uint8)
        if self.bits == 4:
            low, high = nn.functional.pad(flat, (0, self.count % 2)).view(-1, 2).unbind(1)
            flat = low | (high << 4)
        self.numbers.copy_(flat)

    def thaw(self) -> None:
        """Scales and least values become parameters, in float32, until :meth:`freeze`; the whole numbers stay."""
        self.trained = nn.ParameterList(t.view(torch.float16).float() for t in (self.scales, self.least))

    @torch.no_grad()
    def settle(self) -> None:
        """Round what :meth:`thaw` made to what can be stored."""
        scales, least = self.trained
        scales.copy_(as_stored(scales, scales)[0])
        least.copy_(as_stored(least, least)[1])

    def freeze(self) -> None:
        """Store what :meth:`thaw` made, and keep no parameter of it."""
        self.settle()
        for stored, found in zip((self.scales, self.least), self.trained, strict=True):
            stored.copy_(found.detach().half().view(torch.int16))
        self.trained = None

    def forward(self) -> Tensor:
        if self.trained is None:
            scales, least = self.scales.view(torch.float16).float(), self.least.view(torch.float16).float()
        else:
            scales, least = self.trained
        found = self._decoded(self.numbers, scales, least, self.count)
        return found[: self.count].view(self.shape).to(autocast_dtype(self.like))

    def rows(self, index: Tensor | slice) -> Tensor:
        """Some rows (n, columns) of a matrix whose rows are whole groups."""
        many, columns = self.shape
        each = columns // self.group
        parts = [self.numbers.view(many, -1), self.scales.view(many, each), self.least.view(many, -1)]
        taken = [t[index] for t in parts] if isinstance(index, slice) else [t.index_select(0, index) for t in parts]
        numbers, scales, least = taken[0].flatten(), taken[1].flatten(), taken[2].flatten()
        scales, least = scales.view(torch.float16).float(), least.view(torch.float16).float()
        found = self._decoded(numbers, scales, least, len(taken[0]) * columns)
        return found.view(-1, columns).to(autocast_dtype(self.like))

    def _decoded(self, flat: Tensor, scales: Tensor, least: Tensor, count: int) -> Tensor:
        """Numbers in float32, of scales and least values that are; of the last group as many as it may have."""
        if self.bits == 4:
            flat = torch.stack((flat & 15, flat >> 4), 1).flatten()[:count]
        if lacking := -count % self.group:
            flat = nn.functional.pad(flat, (0, lacking))
        whole, steps = flat.view(-1, self.group).float(), scales.unsqueeze(1)
        if self.bits == 8:
            return ((whole - 128) * steps).flatten()
        return torch.addcmul(least.unsqueeze(1), whole, steps).flatten()

    def extra_repr(self) -> str:
        return f"{self.shape}, bits={self.bits}, group={self.group}"


def in_groups(flat: Tensor, group: int) -> Tensor:
    """(n,) -> (groups, group); what the last group lacks is NaN, which no scale depends on."""
    lacking = -len(flat) % group
    padded = flat if not lacking else nn.functional.pad(flat, (0, lacking), value=torch.nan)
    return padded.view(-1, group)


def as_stored(scales: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and least values as float16 has them, in the dtype that they came in."""
    scales, least = (t.clamp(-65504, 65504).half().to(t.dtype) for t in (scales, least))
    return scales.clamp_min(SMALLEST), least


def levels(values: Tensor, scales: Tensor, least: Tensor, bits: int) -> Tensor:
    """The nearest whole numbers, from -127 to 127 of 8 bits and from 0 to 15 of 4; groups may broadcast."""
    low, high = (-127, 127) if bits == 8 else (0, 15)
    return ((values - least) / scales).round().clamp(low, high)


def bits_stored(bits: int) -> float:
    """Of a number, with its part of what its group has in common."""
    return bits + (16 if bits == 8 else 32) / GROUPS[bits]


def reach(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The scales (n,) and least values (n,) with which whole numbers reach the extremes of groups (n, g), NaN left out.

    Without an offset the least value is 0.
    """
    if bits == 8:
        largest = rows.abs().nan_to_num(0.0).amax(1)
        return largest / 127, torch.zeros_like(largest)
    least = rows.nan_to_num(torch.inf).amin(1).clamp(-65504, 65504).half().to(rows.dtype)
    most = rows.nan_to_num(-torch.inf).amax(1)
    return (most - least) / 15, least


Stored = nn.Parameter | Grouped
"""Numbers of a part: as they are, or with few bits."""


def stored(shape: Sequence[int], bits: int | None, group: int | None = None) -> Stored:
    """Empty numbers of a shape, as they are where ``bits`` is None."""
    return nn.Parameter(torch.empty(*shape)) if bits is None else Grouped(shape, bits, group)


def held(numbers: Stored) -> Tensor:
    """The tensor itself, or written out of its few bits."""
    return call(numbers) if isinstance(numbers, Grouped) else numbers


@torch.no_grad()
def put(numbers: Stored, values: Tensor, grid: tuple[Tensor, Tensor] | None = None) -> None:
    """Store values, rounded to what can be.

    Args:
        grid: scales and least values of their groups, where there are any; None for what :meth:`Grouped.fill` chooses.
    """
    if isinstance(numbers, Grouped):
        numbers.fill(values, *(grid or (None, None)))
    else:
        numbers.copy_(values)
