"""Causal attention without a mask, for packed texts that all have the same length.

transformers 5 looks at the positions of every batch for texts packed one after the other. Eager, that look waits for
the GPU in every pass; compiled, it always ends in a mask, and a mask keeps scaled_dot_product_attention from its flash
kernel. Attention of a name that transformers does not know is handed no mask at all, and needs none here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "sdpa-causal"


def _causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, **options: Any
) -> tuple[Tensor, None]:
    """(B, H, T, d_h) each, key and value perhaps of fewer heads -> (B, T, H, d_h)."""
    options.pop("is_causal", None)
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=True, **options)


AttentionInterface.register(NAME, _causal)


def without_mask(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose batches from now on are whole sequences without padding; nothing of it is saved."""
    model.set_attn_implementation(NAME)
    return model
