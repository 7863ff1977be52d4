"""The paper's standard Transformer, as Hugging Face's Starcoder2: pre-LN, GELU, biases, RoPE, tied embeddings.

With 32,000 tokens, (layers, width) = (12, 768), (24, 1024), (24, 1536) have 109.63, 335.08 and 729.11 million
parameters: the paper's 110, 335 and 729. There is no modelling code of ours to trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from masa.sharing.share import share


def build(model: Mapping[str, Any], sharing: Mapping[str, Any], context: int, eos_token_id: int = 0) -> nn.Module:
    """A newly initialised language model that shares weights as ``sharing`` says.

    Args:
        model: ``num_layers``, ``hidden_size``, ``num_attention_heads``, ``intermediate_size`` and ``vocab_size``.
        sharing: fields of :class:`masa.SharingSpec`.
        context: tokens a sequence, stored as ``max_position_embeddings`` (RoPE has no table to outgrow).
        eos_token_id: separates documents.

    Weights are drawn from torch's global generator; the parts that methods have in common are the same for the same
    seed. Use ``torch.device("meta")`` to count parameters without memory.
    """
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    config = Starcoder2Config(
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        intermediate_size=model["intermediate_size"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_attention_heads"],
        num_key_value_heads=model["num_attention_heads"],
        hidden_act="gelu",
        max_position_embeddings=context,
        initializer_range=0.02,
        use_bias=True,
        sliding_window=None,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        residual_dropout=0.0,
        embedding_dropout=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=None,
    )
    return share(Starcoder2ForCausalLM(config), sharing)
