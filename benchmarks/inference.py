"""Inference with MASA-QKVO in terms of vanilla: prefill, decoding, loading and size on disk.

    python benchmarks/inference.py

Both models have L = 12, d = 192 and a vocabulary of 8,000; MASA has S = 4 atoms a projection. Weights are random, one
thread, float32 (a GPU is used where there is one). All ways of one comparison are timed in turn, a round after another.

- prefill: 512 tokens in one forward pass that fills the KV cache;
- decoding: 64 greedy tokens after the first, one at a time over the KV cache.

Folded MASA is the same computation as vanilla, so its ratio should be 1. Unfolded MASA keeps no matrix: every product
reads the S atoms, once for all tokens of a pass, so that decoding reads S times what vanilla reads of attention.
serving.py has whole models and all methods.

Loading is of files that the system has in memory: factored (masa.save), the same with runtime="folded", and the folded
model as transformers stores it. Size is that of all files of a checkpoint.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Row, in_turn, parser, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import masa
from masa.models import language

SIZES = {"num_layers": 12, "hidden_size": 192, "num_attention_heads": 6, "intermediate_size": 768, "vocab_size": 8000}
SHARING = {"method": "masa", "projections": "qkvo", "atoms": 4}
PREFILL, DECODED = 512, 64
FOLDED, UNFOLDED = "folded MASA-QKVO", "unfolded MASA-QKVO"


def main() -> int:
    given = parser(__doc__).parse_args()
    prefill, decoded, rounds = (64, 8, 4) if given.quick else (PREFILL, DECODED, 60)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shared = language.build(SIZES, SHARING, prefill).to(device).eval()
    plain = {
        "vanilla": language.build(SIZES, {"method": "vanilla"}, prefill).to(device).eval(),
        FOLDED: masa.fold(shared),
        UNFOLDED: shared,
    }
    ids = torch.randint(1, SIZES["vocab_size"], (1, prefill), device=device)
    rows = compare("prefill", plain, lambda model: forward(model, ids), prefill, rounds)
    rows += compare("decoding", plain, lambda model: greedy(model, ids[:, :1], decoded), decoded, rounds)
    with tempfile.TemporaryDirectory() as folder:
        rows += stored(shared, Path(folder), max(4, rounds // 3))
    settings = {"model": SIZES, "sharing": SHARING, "prefill": prefill, "decoded": decoded, "rounds": rounds}
    return save("inference", rows, settings | {"device": device, "threads": 1, "dtype": "float32"}, given.out)


def compare(
    what: str, plain: dict[str, nn.Module], work: Callable[[nn.Module], Any], tokens: int, rounds: int
) -> list[Row]:
    """Tokens/s of every model, and of MASA in terms of vanilla."""
    timed = in_turn(what, {name: lambda model=model: work(model) for name, model in plain.items()}, rounds, warm_up=3)
    return [
        *(Row(f"{what}, {name}", tokens / timed.median(name), "tokens/s") for name in plain),
        timed.speed(f"{what}, {FOLDED} : vanilla", FOLDED, "vanilla", "0.98 to 1.02"),
        timed.speed(f"{what}, {UNFOLDED} : vanilla", UNFOLDED, "vanilla"),
    ]


@torch.no_grad()
def forward(model: nn.Module, ids: Tensor) -> None:
    """One pass over all tokens, as the first of a generation."""
    model(input_ids=ids, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def greedy(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    """So many tokens, each the likeliest after those before."""
    cache, found = None, []
    for _ in range(count):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        found.append(ids)
    return torch.cat(found, dim=1)


def stored(model: nn.Module, folder: Path, rounds: int) -> list[Row]:
    """Loading and size of the factored checkpoint in terms of the plain one."""
    factored, plain = masa.save(model, folder / "factored"), folder / "plain"
    masa.fold(model).save_pretrained(plain)
    ways = {
        "factored": lambda: masa.load(factored, runtime="factored"),
        "factored, then folded": lambda: masa.load(factored, runtime="folded"),
        "plain": lambda: AutoModelForCausalLM.from_pretrained(plain),
    }
    timed = in_turn("loading", ways, rounds)
    size = {path.name: sum(file.stat().st_size for file in path.iterdir()) for path in (factored, plain)}
    return [
        *(Row(f"loading, {way}", timed.median(way), "s") for way in ways),
        timed.speed("speed of loading, factored : plain", "factored", "plain"),
        timed.speed("speed of loading, factored and folded : plain", "factored, then folded", "plain"),
        *(Row(f"size, {name}", count / 2**20, "MiB") for name, count in size.items()),
        Row("size, factored : plain", size["factored"] / size["plain"], target="<= 1"),
    ]


if __name__ == "__main__":
    sys.exit(main())
