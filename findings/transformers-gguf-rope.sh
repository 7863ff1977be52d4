#!/usr/bin/env bash
# A GGUF file that scales RoPE (every Llama 3.1 and 3.2, and all with linear or yarn scaling): read without the scaling.
#
# Expected: `from_pretrained(…, gguf_file=…)` gives the model that the file describes, or names what it cannot take over. The
#   key `llama.rope.scaling.type` and the tensor `rope_freqs.weight` are part of the format; llama.cpp computes with both.
# What happens: neither is in the reader's tables; the configuration says `rope_type: default`, nothing is printed at the usual
#   level, and the logits are others.
# Versions: transformers 5.23.0, gguf 0.19.0, torch 2.14.1; 2026-11-27.
# Source: transformers/integrations/ggml.py, `GGUF_CONFIG_MAPPING`, and modeling_gguf_pytorch_utils.py, where tensors without a
#   name in the model are passed over. The tensor was introduced by https://github.com/ggml-org/llama.cpp/pull/8676. No thread of
#   transformers' was found.
# Remedy: `config.rope_parameters` by hand, from the original folder's config.json.
# Output seen:
#   linear, in the file: factor 4.0; read: default
#   rope_freqs, in the file: factors up to 8.0; read: default
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.14.1 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 numpy==2.4.6
"$folder/env/bin/python" - "$folder" <<'PYTHON'
import sys
from pathlib import Path

import gguf
import numpy as np
from transformers import AutoModelForCausalLM

folder = Path(sys.argv[1])


def written(name, scaling=None, factors=None):
    """A whole Llama of one layer."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(folder / name, "llama")
    writer.add_name(name)
    writer.add_context_length(128), writer.add_embedding_length(32), writer.add_block_count(1)
    writer.add_feed_forward_length(48), writer.add_head_count(2), writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16), writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5), writer.add_vocab_size(64)
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    shapes = {"token_embd": (64, 32), "output": (64, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (48, 32), "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48)}
    shapes |= {"blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for tensor, shape in shapes.items():
        writer.add_tensor(f"{tensor}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name).config.rope_parameters["rope_type"]


read = [written("linear.gguf", scaling=4.0)]
factors = np.array([1, 1, 1, 2, 4, 8, 8, 8], np.float32)
read.append(written("llama3.gguf", factors=factors))
print("linear, in the file: factor 4.0; read:", read[0])
print(f"rope_freqs, in the file: factors up to {factors.max()}; read:", read[1])
raise SystemExit(0 if read == ["default", "default"] else 1)
PYTHON
