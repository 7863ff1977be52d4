"""Calibration against the plain forward pass, in tokens a second.

    python benchmarks/calibration_speed.py [--model FOLDER]      # default: a random Llama of SmolLM2-135M's shape

Calibration runs the same forward pass and gathers the second moments of every projection's input; the two are timed in
turn, in float32.
"""

from __future__ import annotations

import sys

import torch
from harness import in_turn, parser, save
from transformers import LlamaConfig, LlamaForCausalLM

from masa.compression import calibrate
from masa.models.pretrained import load_pretrained

SAMPLES, LENGTH = 4, 256
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--model", help="folder, GGUF file or hub id")
    given = made.parse_args()
    if given.model:
        model, _ = load_pretrained(given.model)
    else:
        shape = SHAPE | ({"num_hidden_layers": 2, "vocab_size": 512} if given.quick else {})
        model = LlamaForCausalLM(LlamaConfig(**shape, **HEADS)).eval()
    torch.set_num_threads(1)
    tokens = torch.randint(0, model.config.vocab_size, (SAMPLES, LENGTH))

    @torch.no_grad()
    def forward() -> None:
        model(tokens, use_cache=False)

    ways = {"forward": forward, "calibration": lambda: calibrate(model, tokens)}
    timed = in_turn("calibration", ways, 2 if given.quick else 6)
    row = timed.speed("tokens/s, calibration : forward pass", "calibration", "forward", ">= 0.7")
    return save(
        "calibration_speed", [row], {"tokens": [SAMPLES, LENGTH], "model": given.model, "threads": 1}, given.out
    )


if __name__ == "__main__":
    sys.exit(main())
