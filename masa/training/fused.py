"""Liger's Triton kernels for the two parts of a pass that eager PyTorch moves most bytes for: the loss and RoPE.

The loss is taken of the hidden states a few thousand tokens at a time, so that the logits of a whole batch never exist.
A compiled model has its own fused kernels, and a CPU none of these.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ROPE = "apply_rotary_pos_emb"


def fits(model: nn.Module) -> bool:
    """Whether the kernels are installed, and the model is a language model that has these two parts."""
    rotates = hasattr(sys.modules[type(model).__module__], ROPE)
    head = getattr(model, "lm_head", None)
    plain = isinstance(head, nn.Linear) and head.bias is None
    return rotates and plain and importlib.util.find_spec("liger_kernel") is not None


class FusedKernels:
    """One pass of a causal language model with both kernels; the model's own functions are back afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.module = model, sys.modules[type(model).__module__]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        head, rope = self.model.lm_head, getattr(self.module, ROPE)
        head.forward = _unchanged
        self.model.loss_function = partial(_loss, head)
        setattr(self.module, ROPE, liger_rotary_pos_emb)
        try:
            yield
        finally:
            setattr(self.module, ROPE, rope)
            del head.forward, self.model._loss_function


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


def _loss(
    head: nn.Linear, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None, **_: Any
) -> Tensor:
    """transformers' loss of a causal model, of what should become logits (B, T, d): token t predicts token t + 1."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    following = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    loss = liger_fused_linear_cross_entropy(
        logits.flatten(0, 1),
        head.weight,
        following.flatten(),
        reduction="mean" if num_items_in_batch is None else "sum",
        accum_dtype=torch.float32,
    )
    return loss if num_items_in_batch is None else loss / num_items_in_batch
