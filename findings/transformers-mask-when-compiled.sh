#!/usr/bin/env bash
# A causal language model, compiled for training: transformers builds a full attention mask that it does not build eagerly.
#
# Expected: for a batch without padding, without a cache and without position ids, `sdpa` attention gets no mask and
#   `is_causal=True`, compiled as well as not, so that PyTorch's flash kernel may be used. transformers' documentation of the
#   attention interface says that sdpa falls back to its own causal flag where no mask is needed.
# What happens: with neither padding nor cache the model's own positions are looked at, whether several sequences were packed
#   into one row. Eagerly that look ends in "none" (after waiting for the device, once a forward pass). Compiled it cannot
#   end, since it depends on data, so packing is assumed: every layer gets a mask (B, 1, T, T) and `is_causal=False`. The
#   numbers are the same; flash attention is out, and the mask is memory.
# Versions: transformers 5.23.0 and 5.17.0, torch 2.14.1; 2026-11-27.
# Source: transformers/masking_utils.py, `find_packed_sequence_indices` and `_preprocess_mask_arguments`. Of masks that are made
#   whenever a model is traced: https://github.com/huggingface/transformers/issues/48925, pull request 48975 there (open); the
#   look for packed sequences is a second reason, which training alone meets.
# Remedy: an attention function of one's own name (`AttentionInterface.register`) without a mask function of that name: it is
#   handed no mask. Or `attention_mask` of ones and a cache that is not None.
# Output seen:
#   eager: 2 calls of scaled_dot_product_attention, with a mask: 0, is_causal: 2
#   compiled: 2 calls of scaled_dot_product_attention, with a mask: 2, is_causal: 0
#   the same loss: True
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 transformers==5.23.0 numpy==2.4.6
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None)).train()
ids = torch.randint(0, 64, (2, 16))
calls = []
attend = torch.nn.functional.scaled_dot_product_attention


def watched(*args, **options):
    calls.append((options.get("attn_mask") is not None, bool(options.get("is_causal"))))
    return attend(*args, **options)


torch.nn.functional.scaled_dot_product_attention = watched
eager = model(input_ids=ids, labels=ids, use_cache=False).loss
torch.nn.functional.scaled_dot_product_attention = attend
seen = {"eager": list(calls)}
calls.clear()


def look(graph, inputs):
    for node in graph.graph.nodes:
        if "scaled_dot_product_attention" in str(node.target):
            calls.append((node.kwargs.get("attn_mask") is not None, bool(node.kwargs.get("is_causal"))))
    return graph


compiled = torch.compile(model, backend=look, dynamic=False)(input_ids=ids, labels=ids, use_cache=False).loss
seen["compiled"] = list(calls)
for how, found in seen.items():
    masked, causal = sum(m for m, _ in found), sum(c for _, c in found)
    print(f"{how}: {len(found)} calls of scaled_dot_product_attention, with a mask: {masked}, is_causal: {causal}")
print("the same loss:", bool(torch.allclose(eager, compiled)))
if seen != {"eager": [(False, True)] * 2, "compiled": [(True, False)] * 2}:
    raise SystemExit("changed: masks are made otherwise")
PYTHON
