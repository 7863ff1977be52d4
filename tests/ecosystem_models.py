"""One small model of every kind of source, and what is asked of each: the same behaviours as of a plain model."""

from __future__ import annotations

import copy
import functools

import torch
from compression_models import statistics, tiny_llama, tokens
from torch import nn

import masa
import masa.compression

SHARED = {
    "masa": {"method": "masa", "projections": "qkvo", "atoms": 2},
    "masa-mlp": {"method": "masa", "coefficients": "mlp"},
    "masa-common": {"method": "masa", "projections": "qo", "dictionaries": ["qo"]},
    "low-rank": {"method": "low-rank"},
    "sequential": {"method": "sequential"},
    "repeat": {"method": "repeat-all-over"},
    "masa-per-head": {"method": "masa-per-head"},
    "relaxed": {"method": "relaxed"},
}
PARTS = ("sparse-fisher", "dictionary-pairs", "low-rank-sparse")
COMPRESSED = ("svd-llm", "matrix-pca", "basis-sharing", "direct-share", *PARTS)
KINDS = (*SHARED, *COMPRESSED)
FEW = ("masa", "low-rank", "matrix-pca", "svd-llm", "dictionary-pairs")
"""A kind of each way to multiply, for what takes long."""


@functools.cache
def _base(kind: str) -> nn.Module:
    if kind in SHARED:
        torch.manual_seed(0)
        return masa.share(tiny_llama(), SHARED[kind]).eval()
    return masa.compression.compress(tiny_llama(), kind, statistics(), 0.35, tokens=tokens())[0]


def make(kind: str) -> nn.Module:
    """A model of its own; "plain" is one that shares nothing."""
    return tiny_llama() if kind == "plain" else copy.deepcopy(_base(kind))


def ids() -> torch.Tensor:
    return tokens()[:2]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=ids()).logits


def difference(model: nn.Module, other: nn.Module | torch.Tensor) -> float:
    """Largest difference of the logits."""
    expected = other if isinstance(other, torch.Tensor) else logits(other)
    return float((logits(model) - expected).abs().max())
