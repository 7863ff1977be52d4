"""Loss and perplexity on held-out text: every token but the first is scored exactly once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

BATCH = 16


@dataclass(frozen=True)
class HeldOutLoss:
    """Negative log-likelihoods in nats of tokens 1, 2, … of a text, (N - 1,) float64."""

    nll: Tensor

    @property
    def mean(self) -> float:
        """Nats a token."""
        return float(self.nll.mean())

    def perplexity(self, units: int) -> float:
        """exp(total / units): word perplexity with the number of words, byte perplexity with that of bytes."""
        return math.exp(float(self.nll.sum()) / units)

    def by_document(self, ends: list[int]) -> list[float]:
        """Mean loss of each document; ``ends`` are the positions after the documents' last tokens."""
        starts = [1, *ends[:-1]]
        return [float(self.nll[a - 1 : b - 1].mean()) for a, b in zip(starts, ends, strict=True) if b > a]


def tokens_by_document(ends: list[int]) -> list[int]:
    """How many tokens of each document are scored: all but the text's first."""
    starts = [1, *ends[:-1]]
    return [b - a for a, b in zip(starts, ends, strict=True) if b > a]


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: np.ndarray, context: int) -> HeldOutLoss:
    """Score tokens in windows of ``context`` that overlap by one token, so that none is left out.

    Args:
        model: a causal language model; its training mode is restored.
        tokens: (N,) token ids.
        context: window length; a token sees at most ``context`` tokens before it, on average half of that.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = torch.from_numpy(tokens)
    starts = list(range(0, len(ids) - 1, context))
    full = [s for s in starts if s + context < len(ids)]
    batches = [full[i : i + BATCH] for i in range(0, len(full), BATCH)]
    losses = []
    for batch in [*batches, *([s] for s in starts[len(full) :])]:
        windows = torch.stack([ids[s : s + context + 1] for s in batch]).to(device)
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()
        losses.append(
            nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").cpu()
        )
    model.train(was_training)
    return HeldOutLoss(torch.cat(losses).double())
