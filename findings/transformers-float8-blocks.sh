#!/usr/bin/env bash
# A float8 checkpoint whose last block is a partial one: dequantised with the scales in the wrong rows, without a word.
#
# Expected: `weight_block_size: [128, 128]` and `weight_scale_inv` of shape (ceil(192 / 128), 1) = (2, 1) mean that the first
#   scale belongs to rows 0 to 127 and the second to rows 128 to 191, as in DeepSeek-V3's `weight_dequant`. So
#   `FineGrainedFP8Config(dequantize=True)` should give q * s by these, or refuse.
# What happens: the block's size is not read from the configuration but taken as rows / scales, 96, wherever that is a whole
#   number; rows 96 to 127 get the second scale. Where it is none (576 rows, 5 scales) there is a ValueError.
# Versions: transformers 5.23.0, torch 2.14.1; 2026-11-27.
# Source: transformers/integrations/finegrained_fp8.py, `Fp8Dequantize._dequantize_one`. No thread of transformers' was found; of
#   matrices that 128 does not divide: https://github.com/huggingface/transformers/pull/36026
# Remedy: compare the shapes with `weight_block_size` before loading, and multiply out by hand:
#   `s.repeat_interleave(128, 0)[:rows]`.
# Output seen:
#   rows 0 to 95 right: True
#   rows 96 to 127 right: False, they are 4.0 times what they should be
#   rows 128 to 191 right: True
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.14.1 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
"$folder/env/bin/python" - "$folder/model" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1])
torch.manual_seed(0)
sizes = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None)).save_pretrained(folder)
stored = {}
for name, tensor in load_file(folder / "model.safetensors").items():
    stored[name] = tensor
    if name.endswith("_proj.weight"):
        blocks = [-(-size // 128) for size in tensor.shape]
        stored[name] = (tensor * 100).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = (4.0 ** torch.arange(blocks[0]))[:, None].repeat(1, blocks[1]) * 0.01
save_file(stored, folder / "model.safetensors", {"format": "pt"})
config = json.loads((folder / "config.json").read_text())
config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
(folder / "config.json").write_text(json.dumps(config))

loaded = LlamaForCausalLM.from_pretrained(
    folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
)
name = "model.layers.0.mlp.up_proj.weight"
scales = stored[f"{name}_scale_inv"].repeat_interleave(128, 0)[:192]
exact, found = stored[name].float() * scales, dict(loaded.named_parameters())[name].detach()
right = [bool(torch.allclose(exact[rows], found[rows], rtol=1e-5)) for rows in (slice(96), slice(96, 128), slice(128, 192))]
some = exact[96:128].abs() > 1e-6
ratio = float((found[96:128] / exact[96:128])[some].median())
print("rows 0 to 95 right:", right[0])
print(f"rows 96 to 127 right: {right[1]}, they are {ratio:.1f} times what they should be")
print("rows 128 to 191 right:", right[2])
raise SystemExit(0 if right == [True, False, True] else 1)
PYTHON
