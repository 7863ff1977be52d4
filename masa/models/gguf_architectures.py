"""The architectures of GGUF files that are read, as data: what llama.cpp computes for each of them.

A new one is one entry of :data:`ARCHITECTURES`. Keys that all have in common are in :mod:`masa.models.gguf_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Values = Mapping[str, Any]
Undo = Callable[[np.ndarray, str, Values], np.ndarray]


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
        model_type: transformers' name.
        keys: key of the file, without the architecture's name -> attribute of transformers' configuration.
        flags: part of a tensor's name -> attribute that says whether the model has such tensors.
        fixed: attributes that llama.cpp computes with, whatever the file says; a function gets the others.
        turns: fewer than all numbers of a head may be rotated.
        undo: the values of one tensor as transformers stores them.
        pattern: every so many layers one looks at all tokens, the others through the sliding window.
    """

    model_type: str
    keys: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] | Callable[[Values], Mapping[str, Any]] = field(default_factory=dict)
    turns: bool = False
    undo: Undo | None = None
    pattern: int | None = None


def unpermuted(weights: np.ndarray, name: str, config: Values) -> np.ndarray:
    """Rows of q and k in transformers' order: halves of a head, not pairs."""
    heads = {".attn_q.": "num_attention_heads", ".attn_k.": "num_key_value_heads"}
    count = next((config[key] for part, key in heads.items() if part in name), None)
    if count is None:
        return weights
    return weights.reshape(count, -1, 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def one_less(weights: np.ndarray, name: str, config: Values) -> np.ndarray:
    """Norms that transformers stores as the difference to one."""
    return weights - 1 if name.endswith("norm.weight") else weights


def transposed(weights: np.ndarray, name: str, config: Values) -> np.ndarray:
    """Matrices of GPT-2's ``Conv1D``."""
    conv = (".attn_qkv.weight", ".attn_output.weight", ".ffn_up.weight", ".ffn_down.weight")
    return weights.T if name.endswith(conv) else weights


def interleaved(weights: np.ndarray, name: str, config: Values) -> np.ndarray:
    """q, k and v of one head after another, as in GPT-NeoX and BLOOM."""
    if ".attn_qkv." not in name:
        return weights
    count = config["num_attention_heads"]
    return weights.reshape(3, count, -1, *weights.shape[1:]).swapaxes(0, 1).reshape(weights.shape)


_SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_BIASES = {"blk.0.attn_q.bias": "attention_bias"}
_NORM = {"attention.layer_norm_epsilon": "layer_norm_eps"}


def _gemma(large: int) -> Callable[[Values], dict[str, Any]]:
    """llama.cpp scales attention by a head's width, but of the largest model, known by its layers, by width / heads."""

    def fixed(config: Values) -> dict[str, Any]:
        wide = config["hidden_size"] // config["num_attention_heads"]
        scalar = wide if config["num_hidden_layers"] == large else config["head_dim"]
        return {"query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh"}

    return fixed


def _granite(config: Values) -> dict[str, Any]:
    """llama.cpp takes a factor that is 0 or missing for none, and that of attention for the usual one."""
    factors = {name: config.get(name) or 1.0 for name in ("embedding_multiplier", "residual_multiplier")}
    factors["logits_scaling"] = config.get("logits_scaling") or 1.0
    return factors | {"attention_multiplier": config.get("attention_multiplier") or config["head_dim"] ** -0.5}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", flags=_BIASES | {"blk.0.ffn_up.bias": "mlp_bias"}, undo=unpermuted),
    "smollm3": Architecture("smollm3", flags=_BIASES, fixed={"no_rope_layer_interval": 4}, undo=unpermuted),
    "granite": Architecture(
        "granite",
        keys={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        fixed=_granite,
        flags=_BIASES,
        undo=unpermuted,
    ),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", flags=_BIASES),
    "gemma": Architecture("gemma", fixed={"hidden_activation": "gelu_pytorch_tanh"}, undo=one_less),
    "gemma2": Architecture("gemma2", keys=_SOFTCAPS, fixed=_gemma(46), undo=one_less, pattern=2),
    "gemma3": Architecture("gemma3_text", keys=_SOFTCAPS, fixed=_gemma(62), undo=one_less, pattern=6),
    "phi2": Architecture("phi", keys=_NORM, turns=True),
    "phi3": Architecture("phi3", keys={"attention.sliding_window": "sliding_window"}, turns=True),
    "olmo": Architecture("olmo", keys={"attention.clamp_kqv": "clip_qkv"}, undo=unpermuted),
    "olmo2": Architecture("olmo2"),
    "stablelm": Architecture(
        "stablelm",
        keys=_NORM | {"use_parallel_residual": "use_parallel_residual"},
        flags={"blk.0.attn_q.bias": "use_qkv_bias", "attn_q_norm": "qk_layernorm"},
        turns=True,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        keys={"attention.layer_norm_epsilon": "norm_epsilon"},
        flags={"blk.0.attn_q.bias": "use_bias"},
    ),
    "command-r": Architecture(
        "cohere",
        keys=_NORM | {"logit_scale": "logit_scale"},
        flags=_BIASES | {"attn_q_norm": "use_qk_norm"},
        fixed=lambda config: {"logit_scale": config.get("logit_scale") or 1.0},
    ),
    "gpt2": Architecture("gpt2", keys={"attention.layer_norm_epsilon": "layer_norm_epsilon"}, undo=transposed),
    "gptneox": Architecture(
        "gpt_neox",
        keys=_NORM | {"use_parallel_residual": "use_parallel_residual"},
        flags={"blk.0.attn_qkv.bias": "attention_bias"},
        turns=True,
        undo=interleaved,
    ),
    "bloom": Architecture("bloom", keys={"attention.layer_norm_epsilon": "layer_norm_epsilon"}, undo=interleaved),
}
"""Name in the file -> what it is."""

INERT = (
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",  # read with the scaling it belongs to
)
"""Keys that change no number."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0, 8.0),  # 8: BLOOM's, which has no other
    "attention.layer_norm_epsilon": (np.float32(1e-5).item(),),  # OLMo's, which transformers has as a constant
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (1, 0),
    "embedding_scale": (1, 0),
    "residual_scale": (1, 0),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "use_parallel_residual": (True,),
}
"""Keys that no entry above names -> values with which the model is what it is without them."""
