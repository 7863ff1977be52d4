"""Tiny trained-looking Llamas and their statistics, shared by the compression tests."""

from __future__ import annotations

import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from masa.compression import Calibration, calibrate

LAYERS, WIDTH, VOCABULARY = 6, 48, 96
WHOLE_BLOCKS = ("drop-blocks", "replace-me")


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A grouped-query Llama with biases on its projections (by default) and weights large enough to matter."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    extra = {"initializer_range": 0.15, "attention_bias": True, "tie_word_embeddings": True}
    extra |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | heads | extra | changes)))
    for block in model.model.layers:
        for letter in "qkvo":
            if (bias := getattr(block.self_attn, f"{letter}_proj").bias) is not None:
                torch.nn.init.normal_(bias, std=0.1)
    return model.eval()


def tokens(samples: int = 8, length: int = 24) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))


@functools.cache
def statistics(**changes) -> Calibration:
    """Of ``tiny_llama(**changes)`` over ``tokens()``, gradients included."""
    return calibrate(tiny_llama(**changes), tokens(), gradient_samples=len(tokens()))


def fitting(method: str) -> dict[str, bool]:
    """Changes of :func:`tiny_llama` that a method needs."""
    return {"attention_bias": False} if method in ("matrix-pca-aligned", *WHOLE_BLOCKS) else {}


def letters(method: str) -> str:
    """Projections that a method is tried on."""
    return "all" if method in WHOLE_BLOCKS else "qkvo"


def projection_inputs(model: LlamaForCausalLM, ids: torch.Tensor) -> dict[tuple[str, int], torch.Tensor]:
    """What enters q (as k and v) and o of each layer in a plain forward pass: (letter, layer) -> X (tokens, in)."""
    found: dict[tuple[str, int], torch.Tensor] = {}
    handles = []
    for layer, block in enumerate(model.model.layers):
        for letter in "qo":

            def keep(module, args, key=(letter, layer)):
                found[key] = args[0].detach().flatten(0, -2).double()

            handles.append(getattr(block.self_attn, f"{letter}_proj").register_forward_pre_hook(keep))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def weight(model: LlamaForCausalLM, letter: str, layer: int) -> torch.Tensor:
    return getattr(model.model.layers[layer].self_attn, f"{letter}_proj").weight.detach()
