"""What the short trainings of this package have in common: batches, autocast, the learning rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from masa.errors import MasaError, unknown

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def batches(tokens: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches (b, T) of the sequences (N, T) without end, drawn anew each epoch; an epoch's last one may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = iter(torch.randperm(len(tokens), generator=generator).tolist())
        while rows := list(itertools.islice(order, batch_size)):
            yield tokens[rows]


def autocast(device: torch.device, dtype: str | None) -> AbstractContextManager:
    """Autocast to a dtype of :data:`AUTOCAST`, or nothing for None.

    Raises:
        MasaError: another name.
    """
    if dtype is None:
        return nullcontext()
    if dtype not in AUTOCAST:
        raise unknown("dtype", dtype, AUTOCAST)
    return torch.autocast(device.type, dtype=AUTOCAST[dtype])


def check_length(length: int | None, tokens: Tensor) -> int:
    """``length``, or T of the tokens (N, T) for None.

    Raises:
        MasaError: not between 2 and T: one token predicts nothing.
    """
    most = tokens.shape[1]
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or not 2 <= length <= most):
        raise MasaError(f"length must lie between 2 and the sequences' {most} tokens, got {length!r}.")
    return length or most


def cosine(step: int, steps: int, warmup: int = 0) -> float:
    """Factor of the learning rate: linear over the first ``warmup`` steps, then a cosine from 1 towards 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
