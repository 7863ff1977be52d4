"""Time and memory of calibration and compression as functions of the number of layers, extrapolated to a whole model.

    python benchmarks/compression_memory.py                       # blocks of Llama-3.1-8B's shape, 2 and 4 of them
    python benchmarks/compression_memory.py --hidden-size 2048 --intermediate-size 8192 --heads 32 --of 16

Blocks are random, stored in bfloat16 and read memory-mapped. Each count runs in a process of its own; memory is the
peak of anonymous pages (the mapped file's pages can be dropped at any time and do not count). Both grow linearly in the
number of layers, so two counts give the line.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

GIB = 2**30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--intermediate-size", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-value-heads", type=int, default=8)
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 4], help="counts that are measured")
    parser.add_argument("--of", type=int, default=32, help="layers of the whole model")
    parser.add_argument("--method", default="svd-global")
    parser.add_argument("--tokens", type=int, nargs=2, default=[2, 256], metavar=("SAMPLES", "LENGTH"))
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given, given.measure)))
        return 0
    found = []
    for count in given.layers:
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", str(count)]
        found.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
        print(f"{count} layers: {found[-1]}", flush=True)
    (a, b), (first, second) = given.layers, found
    for key in first:
        slope = (second[key] - first[key]) / (b - a)
        print(f"{key}: {slope:.2f} a layer, {first[key] + slope * (given.of - a):.1f} at {given.of} layers")
    return 0


def measure(given: argparse.Namespace, layers: int) -> dict[str, float]:
    """Seconds and peak anonymous GiB of calibrating and compressing ``layers`` blocks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from masa.compression import calibrate, compress
    from masa.pretrained import load_pretrained

    sizes = {
        "hidden_size": given.hidden_size,
        "intermediate_size": given.intermediate_size,
        "num_hidden_layers": layers,
    }
    heads = {"num_attention_heads": given.heads, "num_key_value_heads": given.key_value_heads}
    with tempfile.TemporaryDirectory() as folder:
        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=1024)).save_pretrained(folder)
        torch.set_default_dtype(torch.float32)
        model, _ = load_pretrained(folder)
        tokens = torch.randint(0, 1024, tuple(given.tokens))
        result = {}
        with Peak() as peak:
            calibration = calibrate(model, tokens, dtype=torch.float32, directory=Path(folder) / "c", batch_size=1)
        result |= {"calibration seconds": peak.seconds, "calibration GiB": peak.gib}
        with Peak() as peak:
            compress(model, given.method, calibration, 0.2)
        return result | {f"{given.method} seconds": peak.seconds, f"{given.method} GiB": peak.gib}


class Peak:
    """Peak of anonymous memory above that at the start, and wall time, of a block of code."""

    def __enter__(self) -> Peak:
        self.start, self.most, self.running = anonymous(), 0, True
        self.began = time.perf_counter()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, anonymous())
            time.sleep(0.02)

    def __exit__(self, *error: object) -> None:
        self.seconds, self.running = round(time.perf_counter() - self.began, 1), False
        self.thread.join()
        self.gib = round((self.most - self.start) / GIB, 2)


def anonymous() -> int:
    """Bytes of this process that no file backs (Linux)."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
