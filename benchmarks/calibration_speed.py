"""Calibration against the plain forward pass, in tokens a second: the ratio must be at least 0.7.

    python benchmarks/calibration_speed.py [MODEL_FOLDER]      # default: a random Llama of SmolLM2-135M's shape

The two are timed in turn, three times each, and the best of each is taken, so that a busy machine hurts both alike.
"""

from __future__ import annotations

import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from masa.compression import calibrate
from masa.pretrained import load_pretrained

SAMPLES, LENGTH, LIMIT = 4, 256, 0.7


def main() -> int:
    if len(sys.argv) > 1:
        model, _ = load_pretrained(sys.argv[1])
    else:
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()
    tokens = torch.randint(0, model.config.vocab_size, (SAMPLES, LENGTH))
    plain, calibrated = 0.0, 0.0
    for _ in range(3):
        started = time.perf_counter()
        with torch.no_grad():
            model(tokens, use_cache=False)
        plain = max(plain, tokens.numel() / (time.perf_counter() - started))
        calibrated = max(calibrated, calibrate(model, tokens).tokens_per_second)
    ratio = calibrated / plain
    print(f"plain forward {plain:.0f} tokens/s, calibration {calibrated:.0f} tokens/s, ratio {ratio:.2f} (>= {LIMIT})")
    return 0 if ratio >= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
